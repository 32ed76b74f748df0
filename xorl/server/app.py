"""Builds the FastAPI app, and serves it."""

import asyncio
import contextlib
import gc
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from xorl.config import Config
from xorl.errors import XorlError
from xorl.server import tinker
from xorl.server.checkpoints import Checkpoints
from xorl.server.endpoints import Endpoints, Receiver
from xorl.server.futures import Futures
from xorl.server.gate import Gate
from xorl.server.metrics import Metrics
from xorl.server.models import Engine, Models
from xorl.server.plane import ControlPlane
from xorl.server.routes import checkpoints, health, inference, models, training
from xorl.server.sampling import Sampling
from xorl.server.store import Store
from xorl.sync import receiver

EXPIRY_INTERVAL_S = 60.0
STOP_GRACE_S = 4.0
"""What runs may take this long to finish when the server is told to stop."""

NOT_IN_ERRORS = ("forward_backward_input", "forward_input", "Tensor", "function-plain[_listed()]")
"""Parts of a validation error's place that say nothing to the caller."""

log = structlog.get_logger()


def serve(config: Config) -> None:
    """Run the server until it is told to stop, or the engine turns out unable to start."""
    from xorl.engine.client import EngineClient

    def stop() -> None:
        server.should_exit = True

    engine = EngineClient(config, on_failed_start=stop)
    host, port = config.http.host, config.http.port
    options = uvicorn.Config(
        create_app(config, engine),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    server = _Server(options)
    gc.freeze()  # what is loaded by now stays: walking it takes the collector tens of milliseconds
    log.info("listening", url=f"http://{host}:{port}")
    server.run()
    if engine.failed_to_start:
        sys.exit(1)


class _Server(uvicorn.Server):
    """Answers all who still wait for a result before uvicorn cuts them off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        futures: Futures = app.state.plane.futures
        asyncio.get_running_loop().call_later(STOP_GRACE_S, futures.stop)
        await super().shutdown(sockets)


def create_app(config: Config, engine: Engine, connect: Callable[[str, int], Receiver] | None = None) -> FastAPI:
    """The control plane over an engine, which it starts and stops."""
    plane = _assemble(config, engine, connect or partial(receiver.Receiver, timeout_s=config.sync.sync_timeout_s))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        sweeping = asyncio.create_task(_remove_expired(plane.checkpoints))
        yield
        sweeping.cancel()
        await engine.stop()
        await plane.sampling.close()
        plane.store.close()

    app = FastAPI(
        title="xorl",
        description="Training server for RL on language models",
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # /metrics has it; asking costs each request
    )
    app.state.plane = plane
    routers = (training.router, models.router, checkpoints.router, inference.router, health.router, tinker.router)
    ours = [training.protobuf_route, *(route for router in routers for route in router.routes)]
    app.router.routes[:0] = ours  # include_router would match each path twice, and FastAPI's own pages before ours
    app.add_exception_handler(XorlError, _xorl_error)
    app.add_exception_handler(sqlite3.Error, _store_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Gate, api_key=config.http.api_key, metrics=plane.metrics)
    return app


def _assemble(config: Config, engine: Engine, connect: Callable[[str, int], Receiver]) -> ControlPlane:
    metrics = Metrics()
    store = Store(config.engine.output_dir / "xorl.db")
    kept = Checkpoints(config.engine.output_dir, store)
    endpoints = Endpoints(config.http.inference_hosts, connect)
    return ControlPlane(
        config=config,
        engine=engine,
        models=Models(engine, store, metrics),
        futures=Futures(config.http.retrieve_hold_s, config.http.future_ttl_s),
        checkpoints=kept,
        endpoints=endpoints,
        sampling=Sampling(endpoints, kept, config.sync.max_sampler_adapters),
        store=store,
        metrics=metrics,
    )


async def _remove_expired(kept: Checkpoints) -> None:
    while True:
        kept.remove_expired()
        await asyncio.sleep(EXPIRY_INTERVAL_S)


def _refuse(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


async def _xorl_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, XorlError)
    return _refuse(error.status, str(error))


async def _store_error(_: Request, error: Exception) -> JSONResponse:
    return _refuse(507, f"the run database in output_dir: {error}")


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _refuse(error.status_code, error.detail)


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = min(error.errors(), key=lambda one: one["type"] != "missing")  # any one will do
    place = _place(problem["loc"])
    if problem["type"] == "json_invalid":
        return _refuse(400, f"body: not JSON: {problem['ctx']['error']}")
    if problem["type"] == "missing":
        return _refuse(422, f"{place or 'body'}: missing")
    return _refuse(400, f"{place or 'body'}: {problem['msg'].removeprefix('Value error, ')}")


def _place(location: Sequence[str | int]) -> str:
    """data[3].loss_fn_inputs.weights"""
    _, *inside = location  # after body, query or path
    parts = [part for part in inside if part not in NOT_IN_ERRORS] or inside
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
