"""Reads request bodies: bounded, and JSON without the NaN that Python's own reader lets through."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute


async def bounded_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        HTTPException: 413, as soon as it is known to be larger than max_body_mb.
    """
    limit: int = request.app.state.plane.config.http.max_body_mb * 2**20
    declared = request.headers.get("content-length", "")
    pieces: list[bytes] = []
    size = int(declared) if declared.isdecimal() and int(declared) > limit else 0
    if size <= limit:
        async for piece in request.stream():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                break
    if size > limit:
        raise HTTPException(413, f"body: larger than {limit} bytes")
    return b"".join(pieces)


class StrictRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await bounded_body(self)
        return self._body

    async def json(self) -> Any:
        return orjson.loads(await self.body())


class StrictRoute(APIRoute):
    """The route class of every router here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
