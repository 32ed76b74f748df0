"""Every benchmark still runs, at its smallest, and so does the script that runs them on a GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.harness import Options, compare, report

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
NAMES = ["control_plane", "engine", "fp8_quantize", "fused_lora", "logprobs", "sync"]
"""Those that take --small; each has a main(arguments)."""


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_says_where(name, tmp_path, capsys):
    lines = tmp_path / "results.jsonl"
    importlib.import_module(f"bench.{name}").main(["--small", "--json", str(lines)])
    header, *results = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {"device", "torch", "commit"} <= header.keys()
    assert results
    assert all(min(result["floor_s"], result["median_s"]) > 0 for result in results)
    assert "to floor" in capsys.readouterr().out


def options(**changes) -> Options:
    return Options(**(dict(device=torch.device("cpu"), rounds=3, small=True, json=None) | changes))


def test_a_competitor_can_be_the_floor_of_all():
    results = compare("case", {"fast": lambda: None, "slow": lambda: sum(range(10_000))}, "fast", options())
    fast, slow = results
    assert fast.floor_s == slow.floor_s == fast.median_s
    assert fast.ceiling == "fast"


def test_what_is_prepared_between_trials_is_not_timed(monkeypatch):
    now = 0.0
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    [result] = compare("case", {"run": lambda: spend(1)}, {"run": 1.0}, options(), prepare=lambda: spend(100))
    assert (result.median_s, result.spread_s) == (1, 0)


def test_a_picture_of_what_was_achieved(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "folder" / "results.png"
    results = compare("case", {"run": lambda: sum(range(1000))}, {"run": 1e-9}, options(), ceiling="1 GB/s")
    report("title", results, options(png=path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    results = compare("case", {"run": lambda: None}, {"run": 1e-9}, options())
    report("title", results, options(png=tmp_path / "results.png"))
    assert "matplotlib is missing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def gpu_script(folder: Path, **environment: str) -> tuple[int, str]:
    """Runs bench/gpu.sh on the CPU; its exit status, and what it wrote of the machine."""
    environment = os.environ | {"PYTHON": sys.executable} | environment
    finished = subprocess.run([ROOT / "bench/gpu.sh", "--cpu", folder], env=environment, capture_output=True, text=True)
    return finished.returncode, (folder / "cpu" / "machine.txt").read_text()


def test_gpu_script_goes_on_after_a_failure_and_fails(tmp_path):
    (tmp_path / "test_absent.py").write_text("import a_package_that_is_not_here\n")
    status, machine = gpu_script(tmp_path / "results", TESTS=str(tmp_path), BENCHES="absent fused_lora")
    assert status == 1
    assert (machine.count("failed"), machine.count("passed")) == (2, 1), machine
    assert {"log.txt", "fused_lora.jsonl"} <= {path.name for path in (tmp_path / "results" / "cpu").iterdir()}
    assert f"torch {torch.__version__}" in machine


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpu_script_in_full(tmp_path):
    status, machine = gpu_script(tmp_path)
    assert status == 0, machine
