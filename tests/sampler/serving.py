"""Runs a sampler inside the test's process, reached over ASGI."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from xorl.sampler.app import create_app, load

Client = httpx.AsyncClient
Json = dict[str, Any]


@asynccontextmanager
async def serving(model: Path, dtype: str) -> AsyncIterator[Client]:
    torch.set_num_threads(1)
    sampler = load(str(model), "cpu", dtype)
    transport = httpx.ASGITransport(app=create_app(sampler))
    async with httpx.AsyncClient(transport=transport, base_url="http://sampler", timeout=60) as client:
        yield client
    await asyncio.to_thread(sampler.close)


def drive(model: Path, scenario: Callable[[Client], Coroutine[Any, Any, None]], dtype: str = "float32") -> None:
    """Run `scenario` against a fresh sampler."""

    async def main() -> None:
        async with serving(model, dtype) as client:
            await scenario(client)

    asyncio.run(main())


async def ok(client: Client, path: str, body: Json | None = None) -> Any:
    response = await client.post(path, json=body or {})
    assert response.status_code == 200, response.text
    return response.json()


async def refused(client: Client, path: str, body: Json | None = None) -> str:
    """The message of a 400."""
    response = await client.post(path, json=body or {})
    assert response.status_code == 400, response.text
    answer = response.json()
    if path == "/generate":
        return answer["error"]["message"]
    assert answer["success"] is False
    return answer["message"]


async def generate(client: Client, input_ids: Any, params: Json | None = None, **fields: Any) -> Any:
    return await ok(client, "/generate", {"input_ids": input_ids, "sampling_params": params or {}, **fields})


def logprobs(answer: Json) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
