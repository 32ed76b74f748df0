"""The command line, as a user meets it."""

import os
import subprocess
import sys
from pathlib import Path

from processes import ROOT, free_port


def xorl(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "xorl.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", **environ},
    )


def test_help_lists_the_commands_and_every_setting() -> None:
    assert {"serve", "sampler", "demo", "doctor", "sync-plan"} <= set(xorl("--help").stdout.split())
    flags = xorl("serve", "--help").stdout
    assert {"--model", "--full", "--host", "--port", "--output-dir", "--device", "--dtype"} <= set(
        flags.replace(",", " ").replace("/", " ").split()
    )


def test_a_wrong_setting_ends_the_start_with_its_name() -> None:
    result = xorl("serve", "--model", "m", XORL_PORT="http")
    assert result.returncode == 1
    assert "http.port (XORL_PORT)" in result.stderr


def test_torchrun_alone_says_how_many_ranks_there_are() -> None:
    result = xorl("serve", "--model", "m", "--gpus", "2", RANK="0")
    assert result.returncode == 1
    assert "gpus: leave it out under torchrun" in result.stderr


def test_a_model_that_is_not_there_ends_the_server(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    result = xorl("serve", "--model", missing, "--port", str(free_port()), "--output-dir", str(tmp_path / "output"))
    assert result.returncode == 1
    assert f"model {missing}" in result.stderr


def test_doctor_reports_the_machine_and_the_models_need(tiny_model: Path) -> None:
    result = xorl("doctor", "--model", str(tiny_model))
    assert result.returncode == 0, result.stdout
    for word in ("torch", "extension xorl._C", "gloo", "LoRA training", "full training", "GiB free"):
        assert word in result.stdout
    assert xorl("doctor", "--model", str(tiny_model / "missing")).returncode == 1


def test_sync_plan_says_what_a_model_would_send_and_names_every_term(tiny_model: Path) -> None:
    result = xorl("sync-plan", "--model", str(tiny_model), "--endpoints", "2", "--bandwidth", "50", "--format", "fp8")
    assert result.returncode == 0, result.stderr
    for word in ("bytes", "buckets", "wire", "load", "lag", "fill", "drain", "pause", "total"):
        assert word in result.stdout
    missing = xorl("sync-plan", "--model", str(tiny_model / "missing"), "--bandwidth", "50")
    assert (missing.returncode, "missing" in missing.stdout) == (1, True)
