"""A fake SGLang in a process of its own, which dies or freezes where it is told to, and serves the weights it holds.

All weights of version v are filled with the number v, so an answer shows from which versions it was made.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

import httpx
import torch
from torch import Tensor

from sync.fake_sglang import FakeSglang, Refused

Moment = Literal["before", "during", "after"]
BUCKET = "/update_weights_from_distributed"
SHAPES = {f"model.layers.{i}.weight": (i + 3, 40) for i in range(12)}

_context = get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "safetensors.torch", "httpx", "pydantic", "psutil", "pytest"])


class Fault(NamedTuple):
    """A signal to oneself: when the nth such request arrives, has acted but not answered, or has answered."""

    signal: signal.Signals
    moment: Moment
    path: str
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.signal.name} {self.moment} {self.path}{f' no. {self.nth + 1}' if self.path == BUCKET else ''}"


def tensors(version: int) -> dict[str, Tensor]:
    return {name: torch.full(shape, float(version)) for name, shape in SHAPES.items()}


class MortalSglang(FakeSglang):
    """The fake, with its fault."""

    def __init__(self, port: int) -> None:
        super().__init__(port=port)
        self._fault: Fault | None = None
        self._load(tensors(0))

    def inject(self, number: int, moment: Moment, path: str, nth: int) -> None:
        self._fault = Fault(signal.Signals(number), moment, path, nth)

    def generate(self) -> object:
        if self.paused:
            raise Refused("paused", 503)
        return {"versions": sorted({int(value) for tensor in self.weights.values() for value in tensor.unique()})}

    def answer(self, path: str, body: dict[str, object], key: str | None) -> object:
        self._strike("before", path)
        result = super().answer(path, body, key)
        if path != BUCKET:
            self._strike("during", path)
        return result

    def answered(self, path: str) -> None:
        self._strike("after", path)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """One after the other, so that a fault midway leaves a mixture."""
        for number, (name, tensor) in enumerate(tensors.items()):
            if number == len(tensors) // 2:
                self._strike("during", BUCKET)
            super()._load({name: tensor})

    def _strike(self, moment: Moment, path: str) -> None:
        fault = self._fault
        if fault is None or (fault.moment, fault.path) != (moment, path):
            return
        self._fault = fault._replace(nth=fault.nth - 1) if fault.nth else None
        if not fault.nth:
            signal.pthread_kill(threading.get_ident(), fault.signal)  # takes effect before this returns


def _serve(port: int, ready: Connection) -> None:
    torch.set_num_threads(1)
    server = MortalSglang(port)
    with server.serving():
        ready.send(server.port)
        ready.recv()  # never comes


class Server:
    """A running one, by its process."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        """Again on the same port, with the weights of version 0."""
        ours, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(self.port, theirs), daemon=True)
        self._process.start()
        self._pipe = ours
        self.port = ours.recv()

    def inject(self, fault: Fault) -> None:
        body = {"number": fault.signal, "moment": fault.moment, "path": fault.path, "nth": fault.nth}
        httpx.post(f"http://127.0.0.1:{self.port}/inject", json=body).raise_for_status()

    def served(self, timeout_s: float = 10.0) -> list[int] | str:
        """The versions from which it makes an answer, or why there is none."""
        try:
            answer = httpx.post(f"http://127.0.0.1:{self.port}/generate", json={}, timeout=timeout_s)
        except httpx.TimeoutException:
            return "frozen"
        except httpx.TransportError:
            return "gone"
        return answer.json()["versions"] if answer.is_success else "paused"

    def thaw(self) -> None:
        os.kill(self._process.pid or 0, signal.SIGCONT)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, signal.SIGKILL)
        self._process.join()


@contextmanager
def servers(number: int) -> Iterator[list[Server]]:
    started = [Server() for _ in range(number)]
    yield started
    for server in started:
        server.kill()
