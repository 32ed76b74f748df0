"""The control plane in this process, over fakes, with a client."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI

from fakes import INFO, FakeEngine, FakeReceivers
from xorl.config import Config
from xorl.server.app import create_app


@dataclass
class Server:
    app: FastAPI
    engine: FakeEngine
    receivers: FakeReceivers
    http: httpx.AsyncClient
    output_dir: Path

    async def post(self, path: str, body: object, status: int = 200, **more: Any) -> dict[str, Any]:
        response = await self.http.post(path, json=body, **more)
        assert response.status_code == status, f"{response.status_code} {response.text}"
        return response.json()

    async def get(self, path: str, status: int = 200) -> dict[str, Any]:
        response = await self.http.get(path)
        assert response.status_code == status, f"{response.status_code} {response.text}"
        return response.json()

    async def retrieve(self, request_id: str) -> dict[str, Any]:
        return await self.post("/api/v1/retrieve_future", {"request_id": request_id})

    async def do(self, call: str, body: object) -> dict[str, Any]:
        """Submit and wait for the result."""
        ref = await self.post(f"/api/v1/{call}", body)
        return await self.retrieve(ref["request_id"])

    async def refused(self, call: str, body: object, status: int = 400) -> str:
        return (await self.post(f"/api/v1/{call}", body, status))["detail"]

    async def create(self, model_id: str, **lora_config: object) -> dict[str, Any]:
        body = {"model_id": model_id, "base_model": "tiny/base", "lora_config": {"rank": 8, **lora_config}}
        return await self.do("create_model", body)


def settings(output_dir: Path, **http: object) -> Config:
    return Config.model_validate(
        {
            "base": {"model": "tiny/base"},
            "engine": {"output_dir": output_dir},
            "http": {"retrieve_hold_s": 5.0, **http},
            "sync": {"max_sampler_adapters": 2},
        }
    )


@contextlib.asynccontextmanager
async def running(output_dir: Path, *, full: bool = False, **http: object) -> AsyncIterator[Server]:
    engine = FakeEngine(msgspec.structs.replace(INFO, full_weights=full))
    receivers = FakeReceivers()
    app = create_app(settings(output_dir, **http), engine, receivers.connect)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://xorl") as client:
            yield Server(app, engine, receivers, client, output_dir)
