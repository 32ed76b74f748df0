"""Stands before every route: asks for the key, counts the answers."""

import hmac

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xorl.server.metrics import Metrics

OPEN_PATHS = ("/health", "/api/v1/healthz")


class Gate:
    def __init__(self, app: ASGIApp, api_key: str, metrics: Metrics) -> None:
        self._app = app
        self._api_key = api_key.encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # set by the router; its path has no ids in it
                self._metrics.requests.labels(route.path if route else "other", message["status"]).inc()
            await send(message)

        if scope["path"] in OPEN_PATHS or self._admits(Headers(scope=scope)):
            await self._app(scope, receive, counted)
        else:
            refusal = JSONResponse({"detail": "send the server's key as Authorization: Bearer or X-API-Key"}, 401)
            await refusal(scope, receive, counted)

    def _admits(self, headers: Headers) -> bool:
        if not self._api_key:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        offered = [headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        return any([hmac.compare_digest(key.encode(), self._api_key) for key in offered])
