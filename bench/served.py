"""Serves the competitors of bench.control_plane, each in a process of its own.

`xorl` is the server over an engine that answers in the same process; `xorl, engine process` has the real engine client
and, at the other end of its socket, a process that answers at once; `FastAPI, pydantic` is the same two-phase protocol
as one would write it down: plain models, lists, a dict of futures. `bare ASGI` reads a body and answers without looking
at it: the least that uvicorn can do.
"""

import asyncio
import contextlib
import gc
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import structlog
import uvicorn
import zmq
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from xorl.config import Config
from xorl.engine.client import EngineClient
from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    Done,
    Forward,
    ForwardBackward,
    ForwardResult,
    ModelInfo,
    OptimStep,
    OptimStepResult,
)
from xorl.server.app import create_app

KINDS = ("xorl", "xorl, engine process", "FastAPI, pydantic", "bare ASGI")

TICK_S = 0.001

INFO = ModelInfo(
    names=["null"],
    path="null",
    arch="null",
    vocab_size=151_936,
    max_context_length=8192,
    full_weights=False,
    device="cpu",
    dtype="float32",
    tied_embeddings=True,
)


def nth_core(n: int) -> int:
    """The servers keep to core 0 of those that we may use, the client and the engine process to core 1."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[n % len(cores)]


def answer(command: AnyCommand) -> AnyResult:
    """What the null engine says; a step's grad_norm is the time at which it was said."""
    match command:
        case Forward() | ForwardBackward():
            return ForwardResult(logprobs=bytes(len(command.datums.targets)), elementwise_loss=None, metrics={})
        case OptimStep():
            return OptimStepResult(grad_norm=time.perf_counter(), learning_rate=command.adam.learning_rate, step=1)
        case _:
            return Done()


def delay_s(command: AnyCommand) -> float:
    """How long the engine pretends to work: as many seconds as the step's weight_decay, which is nothing else here."""
    return command.adam.weight_decay if isinstance(command, OptimStep) else 0.0


class NullEngine:
    """Answers in the server's own process."""

    num_queued = 0
    last_step = None

    def __init__(self) -> None:
        self.info: ModelInfo | None = INFO
        self.state: Literal["starting", "running", "dead"] = "running"

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def submit(self, command: AnyCommand) -> asyncio.Future[AnyResult]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[AnyResult] = loop.create_future()
        loop.call_later(delay_s(command), lambda: future.set_result(answer(command)))
        return future


class AdamParams(BaseModel):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Step(BaseModel):
    model_id: str = "default"
    seq_id: int | None = None
    adam_params: AdamParams = AdamParams()


class Tensor(BaseModel):
    data: list[float]
    dtype: str
    shape: list[int]


class ModelInput(BaseModel):
    input_ids: list[int]


class Datum(BaseModel):
    model_input: ModelInput
    loss_fn_inputs: dict[str, Tensor]


class Input(BaseModel):
    data: list[Datum]
    loss_fn: str


class ForwardBackwardRequest(BaseModel):
    model_id: str = "default"
    seq_id: int | None = None
    forward_backward_input: Input


class Ref(BaseModel):
    request_id: str
    model_id: str = "default"


def plain() -> FastAPI:
    """The peer: it checks types, and nothing of what the numbers say."""
    app = FastAPI()
    futures: dict[str, asyncio.Future[dict]] = {}

    def add(model_id: str, result: dict, delay_s: float = 0.0) -> Ref:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        request_id = f"future_{len(futures):012x}"
        futures[request_id] = future
        loop.call_later(delay_s, lambda: future.set_result(result | {"at": time.perf_counter()}))
        return Ref(request_id=request_id, model_id=model_id)

    @app.post("/api/v1/optim_step")
    async def optim_step(body: Step) -> Ref:
        adam = body.adam_params
        return add(body.model_id, {"learning_rate": adam.learning_rate, "step": 1}, adam.weight_decay)

    @app.post("/api/v1/forward_backward")
    async def forward_backward(body: ForwardBackwardRequest) -> Ref:
        lengths = [len(datum.model_input.input_ids) for datum in body.forward_backward_input.data]
        outputs = [{"logprobs": Tensor(data=[0.0] * n, dtype="float32", shape=[n])} for n in lengths]
        return add(body.model_id, {"loss_fn_outputs": outputs})

    @app.post("/api/v1/retrieve_future")
    async def retrieve_future(body: Ref) -> dict:
        result = await futures[body.request_id]
        return {"metrics": {"grad_norm": result["at"]}, **result}

    return app


async def bare(_: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    body = b'{"request_id":"future_000000000000","model_id":"default"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Ticked:
    """Answers GET /stall with the longest time since the last such call in which the event loop was busy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._longest_s = self._last_tick = 0.0
        self._ticker: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/stall":
            await self._app(scope, receive, send)
            return
        if self._ticker is None:
            self._last_tick = time.perf_counter()
            self._ticker = asyncio.create_task(self._run())
        self._tick()
        body = str(self._longest_s).encode()
        self._longest_s = 0.0
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._tick()

    def _tick(self) -> None:
        now = time.perf_counter()
        self._longest_s = max(self._longest_s, now - self._last_tick)
        self._last_tick = now


@contextlib.contextmanager
def served() -> Iterator[dict[str, int]]:
    """The port on which a server process of each kind listens; this process keeps to the client's core meanwhile."""
    cores = os.sched_getaffinity(0)
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, text=True)
    processes = {kind: start([sys.executable, "-m", "bench.served", kind]) for kind in KINDS}
    os.sched_setaffinity(0, {nth_core(1)})
    try:
        yield {kind: int(process.stdout.readline()) for kind, process in processes.items() if process.stdout}
    finally:
        os.sched_setaffinity(0, cores)
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.communicate()


def serve(kind: str) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryDirectory() as folder:
        print(listener.getsockname()[1], flush=True)  # who connects now is answered once the app is up
        app = Ticked(_app(kind, Path(folder)))
        os.sched_setaffinity(0, {nth_core(0)})
        options = uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False)
        gc.freeze()  # as xorl serve does
        uvicorn.Server(options).run([listener])


def _app(kind: str, folder: Path) -> ASGIApp:
    config = Config.model_validate(
        {"base": {"model": "null"}, "engine": {"output_dir": folder}, "http": {"retrieve_hold_s": 20.0}}
    )
    match kind:
        case "xorl":
            return create_app(config, NullEngine())
        case "xorl, engine process":
            return create_app(config, _engine_process(config, folder))
        case "FastAPI, pydantic":
            return plain()
        case _:
            return bare


def _engine_process(config: Config, folder: Path) -> EngineClient:
    """The client starts `sys.executable -m xorl.engine.loop COMMANDS RESULTS FOLDER`: give it one that starts ours."""
    executable = folder / "engine"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bench.served engine "$3" "$4" {nth_core(1)}\n')
    executable.chmod(0o700)
    sys.executable = str(executable)
    return EngineClient(config)


def run_engine(commands_from: str, results_to: str, core: int) -> None:
    """An engine process that answers at once, while the client, whose core it has, waits."""
    os.sched_setaffinity(0, {core})
    decoder = msgspec.msgpack.Decoder(AnyCommand)
    commands, results = (zmq.Context.instance().socket(kind) for kind in (zmq.PULL, zmq.PUSH))
    for channel, address in ((commands, commands_from), (results, results_to)):
        channel.set_hwm(0)
        channel.connect(address)
    results.send_multipart([bytes(8), msgspec.msgpack.encode(INFO)])
    while True:
        number, body = commands.recv_multipart()
        command = decoder.decode(body)
        time.sleep(delay_s(command))
        results.send_multipart([number, msgspec.msgpack.encode(answer(command))])


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        run_engine(*sys.argv[2:4], core=int(sys.argv[4]))
    else:
        serve(sys.argv[1])
