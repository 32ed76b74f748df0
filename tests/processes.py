"""Starts real servers in processes of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

START_TIMEOUT_S = 120
ROOT = Path(__file__).parents[1]
XORL = (sys.executable, "-m", "xorl.cli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "xorl.cli")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(
    log: Path, *arguments: str, environ: dict[str, str] | None = None, command: Sequence[str] = XORL
) -> Iterator[str]:
    """`xorl ARGUMENTS --port P` until the block ends; yields its URL once /health answers 200.

    It must stop cleanly on SIGTERM; torchrun, which calls every signal a failure, must stop.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(environ or {})},
        )
    try:
        _wait_until_healthy(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    assert command is TORCHRUN or code in (0, -signal.SIGTERM), f"exit code {code}:\n{log.read_text()[-4000:]}"


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            health = httpx.get(f"{url}/health", timeout=5)
            if health.status_code == 200:
                return
            if "unhealthy" in health.text:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} did not become healthy:\n{log.read_text()[-4000:]}")
