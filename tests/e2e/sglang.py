"""Starts a real SGLang on the CPU, and asks what it serves."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from processes import free_port

PYTHON = os.environ.get("XORL_SGLANG_PYTHON", "")
START_TIMEOUT_S = 150.0


@contextmanager
def sglang(model: Path, log: Path, *flags: str, tp: int = 1) -> Iterator[int]:
    """A server for the model; yields its port."""
    port = free_port()
    options = {
        "model-path": model,
        "port": port,
        "host": "127.0.0.1",
        "device": "cpu",
        "dtype": "float32",
        "tp": tp,
        "attention-backend": "torch_native",
        "grammar-backend": "none",
        "max-total-tokens": 4096,
        "cuda-graph-backend-decode": "disabled",
        "cuda-graph-backend-prefill": "disabled",
    }
    arguments = [part for flag, value in options.items() for part in (f"--{flag}", str(value))]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PYTHON, "-m", "sglang.launch_server", *arguments, "--skip-server-warmup", *flags],
            env=_environ(tp),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(port, process, log)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _environ(tp: int) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(tp))} if tp > 1 else {}
    mode = {"SGLANG_USE_CPU_ENGINE": "1", "SGL_CPU_FP8_REFERENCE": "1"}
    return own | binding | mode | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _wait_until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"SGLang did not become healthy:\n{log.read_text(errors='replace')[-4000:]}")


def generate(port: int, prompt: Sequence[int], num_tokens: int, **options: object) -> dict[str, Any]:
    """meta_info of a completion, with log-probabilities of the prompt."""
    request = {
        "input_ids": list(prompt),
        "sampling_params": {"max_new_tokens": num_tokens, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        **options,
    }
    answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=request, timeout=60)
    return answer.raise_for_status().json()["meta_info"]


def served_logprobs(port: int, prompt: Sequence[int], **options: object) -> list[float]:
    """Of the prompt's tokens after the first."""
    return [entry[0] for entry in generate(port, prompt, 1, **options)["input_token_logprobs"][1:]]
