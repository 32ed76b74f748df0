"""A server over fakes for each test."""

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from inprocess import Server, running


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def server(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Server]:
    async with running(tmp_path) as server:
        yield server


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[Server]]:
    """`async with serve(full=True) as server`; keyword arguments are http settings."""
    return functools.partial(running, tmp_path)
