"""Reads request bodies: bounded, and JSON without the NaN that Python's own reader lets through."""

import hashlib
from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from xorl.server import arrays
from xorl.server.schema import Wire


class Body(NamedTuple):
    content: bytearray
    digest: bytes
    """What makes two requests the same: the SHA-256 of the call's path and of the content."""


class StrictRequest(Request):
    """A request whose body is read once."""

    _body_read: Body | None = None

    async def read(self) -> Body:
        """The whole body, hashed as it comes.

        Raises:
            HTTPException: 413, as soon as it is known to be larger than max_body_mb.
        """
        if self._body_read is None:
            limit: int = self.app.state.plane.config.http.max_body_mb * 2**20
            declared = self.headers.get("content-length", "")
            size = int(declared) if declared.isdecimal() else 0
            content = bytearray()  # grows where it is: joining the pieces at the end would take ten times as long
            digest = hashlib.sha256(self.scope["path"].encode() + b"\n")
            if size <= limit:
                async for piece in self.stream():
                    content += piece
                    digest.update(piece)
                    size = max(size, len(content))
                    if size > limit:
                        break
            if size > limit:
                raise HTTPException(413, f"body: larger than {limit} bytes")
            self._body_read = Body(content, digest.digest())
        return self._body_read

    async def body(self) -> bytes:
        return bytes((await self.read()).content)

    async def json(self) -> Any:
        return orjson.loads((await self.read()).content)


class StrictRoute(APIRoute):
    """The route class of every router here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


class DirectRoute(StrictRoute):
    """A call that comes by the thousand: FastAPI describes it, and is not in the way when it runs.

    The endpoint takes `body`, a wire model, and `request`, a StrictRequest; long lists of numbers come as arrays.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if scope["path"] == self.path else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            return await super().handle(scope, receive, send)
        request = StrictRequest(scope, receive)
        body = _parse((await request.read()).content, request.headers.get("content-type", ""), self._model)
        answer = await self.endpoint(body, request)
        if isinstance(answer, Wire):
            answer = Response(answer.model_dump_json(), media_type="application/json")
        await answer(scope, receive, send)

    @cached_property
    def _model(self) -> type[Wire]:
        return get_type_hints(self.endpoint)["body"]


def _parse(content: bytearray, content_type: str, model: type[Wire]) -> Wire:
    """The body as FastAPI would give it to an endpoint, or as it would refuse it."""
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if not content:
            problems = [{"type": "missing", "loc": ()}]
        elif kind != "application/json" and not kind.endswith("+json"):
            raise HTTPException(400, "body: its content-type must be application/json")
        else:
            return model.model_validate(arrays.loads(content))
    except orjson.JSONDecodeError as error:
        problems = [{"type": "json_invalid", "loc": (), "ctx": {"error": error.msg}}]
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
    raise RequestValidationError([{**problem, "loc": ("body", *problem["loc"])} for problem in problems])
