"""Pushes weights into a real SGLang server on the CPU and asks it what it serves.

XORL_SGLANG_PYTHON names the Python of an environment that holds SGLang; it need not be ours.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from processes import free_port
from tiny import save_tiny_model
from xorl.engine.commands import Endpoint, EndpointReport, SyncWeights
from xorl.sync.formats import Weight
from xorl.sync.push import WeightSync
from xorl.sync.receiver import Receiver
from xorl.types import PauseMode

SGLANG_PYTHON = os.environ.get("XORL_SGLANG_PYTHON", "")
START_TIMEOUT_S = 150.0
PROMPT = [5, 17, 99, 3, 42, 64, 8, 120]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SGLANG_PYTHON, reason="XORL_SGLANG_PYTHON does not name a Python that has SGLang"),
]


@contextmanager
def sglang(model: Path, log: Path) -> Iterator[int]:
    """A server for the model; yields its port."""
    port = free_port()
    flags = {
        "model-path": model,
        "port": port,
        "host": "127.0.0.1",
        "device": "cpu",
        "dtype": "float32",
        "attention-backend": "torch_native",
        "grammar-backend": "none",
        "max-total-tokens": 4096,
        "cuda-graph-backend-decode": "disabled",
        "cuda-graph-backend-prefill": "disabled",
    }
    arguments = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SGLANG_PYTHON, "-m", "sglang.launch_server", *arguments, "--skip-server-warmup"],
            env=environ | {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
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


def generate(port: int, num_tokens: int) -> dict[str, Any]:
    receiver = Receiver("127.0.0.1", port, timeout_s=60)
    answer = receiver.generate(
        {
            "input_ids": PROMPT,
            "sampling_params": {"max_new_tokens": num_tokens, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
    )
    receiver.close()
    assert isinstance(answer, dict)
    return answer["meta_info"]


def served_logprobs(port: int) -> Tensor:
    return torch.tensor([entry[0] for entry in generate(port, 1)["input_token_logprobs"][1:]])


@torch.no_grad()
def true_logprobs(model: PreTrainedModel) -> Tensor:
    logits = model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def command(port: int, pause_mode: PauseMode, version: str) -> SyncWeights:
    return SyncWeights(
        model_id="default",
        endpoints=[Endpoint("127.0.0.1", port)],
        master_address="",
        master_port=0,
        group_name="weight_sync_group",
        bucket_bytes=60_000,
        flush_cache=False,
        cache_mode="auto",
        pause_mode=pause_mode,
        weight_version=version,
        quantization=None,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sglang_serves_what_was_pushed(tmp_path, tied):
    start, *changed = [
        AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / str(seed), tied=tied, seed=seed)).eval()
        for seed in range(3)
    ]
    sync = WeightSync(30.0, torch.device("cpu"))
    with sglang(tmp_path / "0", tmp_path / "server.log") as port, ThreadPoolExecutor(1) as threads:
        torch.testing.assert_close(served_logprobs(port), true_logprobs(start), rtol=0, atol=1e-4)
        running = threads.submit(generate, port, 300)
        for pause_mode, version, model in zip(("retract", "abort"), ("v1", "v2"), changed, strict=True):
            weights = [Weight(name, parameter, parameter.dtype) for name, parameter in model.named_parameters()]
            report = sync.push(command(port, pause_mode, version), weights)
            assert report.endpoints == [EndpointReport("127.0.0.1", port, True, "")]
            assert report.num_buckets > 2
            torch.testing.assert_close(served_logprobs(port), true_logprobs(model), rtol=0, atol=1e-4)
            assert generate(port, 1)["weight_version"] == version
            if pause_mode == "retract":
                assert running.result(60)["completion_tokens"] == 300, "it went on after the push"
            print(report)
        sync.close()
        again = WeightSync(30.0, torch.device("cpu"))
        weights = [Weight(name, parameter, parameter.dtype) for name, parameter in start.named_parameters()]
        again.push(command(port, "retract", "v3"), weights)
        torch.testing.assert_close(served_logprobs(port), true_logprobs(start), rtol=0, atol=1e-4)
        again.close()
