"""Starts the demo's two servers and stops them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 20
MAX_BATCH_TOKENS = 1024
"""Bounds the activations: with SmolLM2-135M the engine peaked at 4.3 GiB, against 9.0 GiB at the default 8192."""


class Servers(NamedTuple):
    """URLs."""

    trainer: str
    sampler: str


@contextmanager
def servers(model: str, output: Path) -> Iterator[Servers]:
    """`xorl serve` and `xorl sampler` on free ports of this machine, both ready; their logs are in `output`."""
    trainer = ("serve", "--model", model, "--output-dir", str(output), "--max-batch-tokens", str(MAX_BATCH_TOKENS))
    with ExitStack() as stack:
        starting = [
            stack.enter_context(_process(output / "serve.log", *trainer)),
            stack.enter_context(_process(output / "sampler.log", "sampler", "--model", model)),
        ]
        for server in starting:
            server.wait_until_ready()
        yield Servers(*(server.url for server in starting))


class _Server(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
        raise RuntimeError(f"{self.url} did not start; the end of {self.log}:\n{self.log.read_text()[-2000:]}")


@contextmanager
def _process(log: Path, *arguments: str) -> Iterator[_Server]:
    port = _free_port()
    command = [sys.executable, "-m", "xorl.cli", *arguments, "--port", str(port)]
    # The servers take turns with the processor, so a thread that waits must not spin.
    environ = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
    try:
        yield _Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
