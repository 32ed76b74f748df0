"""Every kernel compiles for GPUs that are not here, without spills and with wide loads and stores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
WRITE_LITTLE = ("find_amax", "score")  # a number for a block, or for a token
MODULES = ("fp8_quantize", "logprobs", "fused_lora")


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


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_module_compiles_for_every_chip(compiled, module, target):
    assert [kernel for kernel in compiled if (kernel["module"], kernel["target"]) == (module, target)]


def test_no_spills(compiled):
    assert not [kernel for kernel in compiled if kernel["stack"]]


def test_shared_memory_suffices(compiled):
    assert not [kernel for kernel in compiled if kernel["shared"] > SHARED_LIMIT[kernel["target"]]]


def test_aligned_tensors_move_in_pieces_of_16_bytes(compiled):
    aligned = [kernel for kernel in compiled if "unaligned" not in kernel["name"]]
    assert not [kernel for kernel in aligned if kernel["wide_loads"] == 0 or kernel["narrow_loads"]]
    assert not [kernel for kernel in aligned if kernel["narrow_stores"]]
    assert not [
        kernel for kernel in aligned if kernel["wide_stores"] == 0 and not kernel["name"].startswith(WRITE_LITTLE)
    ]


def test_products_use_tensor_cores(compiled):
    for kernel in compiled:
        assert bool(kernel["products"]) == kernel["multiplies"], kernel
        if kernel["multiplies"] and kernel["target"] == "sm_90":
            assert kernel["products"] == "wgmma.mma_async", kernel
    assert {kernel["module"] for kernel in compiled if kernel["multiplies"]} == {"fp8_quantize", "fused_lora"}
