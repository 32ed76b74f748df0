"""Every kernel compiles for GPUs that are not here, without spills and with wide loads and stores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = 227 * 1024


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One process compiles them all: interpreting, as the other tests do, and compiling don't mix."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "bench.aot", "--json", str(folder / "kernels.jsonl")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=280)
    return [json.loads(line) for line in (folder / "kernels.jsonl").read_text().splitlines()]


def test_no_spills(compiled):
    assert not [kernel for kernel in compiled if kernel["stack"]]


def test_shared_memory_suffices(compiled):
    assert not [kernel for kernel in compiled if kernel["shared"] > SHARED_LIMIT]


def test_aligned_weights_move_in_pieces_of_16_bytes(compiled):
    for kernel in (kernel for kernel in compiled if kernel["aligned"]):
        assert kernel["wide_loads"] > 0, kernel
        assert kernel["narrow_stores"] == 0, kernel
        assert kernel["wide_stores"] > 0 or "find_amax" in kernel["name"], kernel
        assert kernel["narrow_loads"] == 0, kernel


def test_products_use_tensor_cores(compiled):
    for kernel in compiled:
        assert bool(kernel["products"]) == ("rank" in kernel["name"]), kernel
        if "rank" in kernel["name"] and kernel["target"] == "sm_90":
            assert kernel["products"] == "wgmma.mma_async", kernel
