"""Holds the parts of the control plane together for the routes."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from xorl.config import Config
from xorl.engine.commands import AnyResult
from xorl.server.answers import Answer
from xorl.server.checkpoints import Checkpoints
from xorl.server.endpoints import Endpoints
from xorl.server.futures import Futures
from xorl.server.metrics import Metrics
from xorl.server.models import Engine, Model, Models
from xorl.server.requests import StrictRequest
from xorl.server.sampling import Sampling
from xorl.server.schema import FutureRef
from xorl.server.store import Store


@dataclass(frozen=True)
class ControlPlane:
    config: Config
    engine: Engine
    models: Models
    futures: Futures
    checkpoints: Checkpoints
    endpoints: Endpoints
    sampling: Sampling
    store: Store
    metrics: Metrics

    def submit(
        self,
        model_id: str,
        seq_id: int | None,
        content: bytes,
        start: Callable[[Model], Coroutine[Any, Any, Answer]],
    ) -> FutureRef:
        """Run a request of a model once, however often it arrives.

        Args:
            content: a digest of the request, which tells a repeat from a new one.
            start: sends the commands before it returns, so that their order is that of the requests; what it
                returns waits for their result.
        """
        model = self.models[model_id]
        request_id = model.earlier(seq_id, content)
        if request_id is None:
            request_id = self.futures.add(start(model))
            model.accept(seq_id, content, request_id)
        return FutureRef(request_id=request_id, model_id=model_id)


def of(request: Request) -> ControlPlane:
    return request.app.state.plane


async def _plane(request: Request) -> ControlPlane:  # async, or FastAPI would run it in a thread
    return of(request)


async def _digest(request: Request) -> bytes:
    assert isinstance(request, StrictRequest)
    return (await request.read()).digest


async def then(future: asyncio.Future[AnyResult], form: Callable[[AnyResult], Answer]) -> Answer:
    """The answer formed from a command's result."""
    return form(await future)


Plane = Annotated[ControlPlane, Depends(_plane)]
Digest = Annotated[bytes, Depends(_digest)]
