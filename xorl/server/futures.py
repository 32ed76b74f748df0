"""Keeps each pending or finished request under its request_id."""

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from xorl.errors import Category, UnknownId, XorlError
from xorl.server.answers import Answer

DELIVERED_TTL_S = 600.0
"""A delivered result stays this long, for a client that lost the answer on the way."""

SWEEP_INTERVAL_S = 60.0
MAX_EXPIRED = 100_000

log = structlog.get_logger()


@dataclass(frozen=True)
class Pending:
    """No result within the time that retrieve_future holds."""


@dataclass(frozen=True)
class Failure:
    error: str
    category: Category


@dataclass
class _Entry:
    task: asyncio.Task[Answer]
    created: float
    delivered: float | None = None


class Futures:
    """request_id -> result. Every retrieve of one id gets the same result, until it expires."""

    def __init__(self, hold_s: float, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._hold_s = hold_s
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._expired: OrderedDict[str, None] = OrderedDict()
        self._next_sweep = clock()
        self.num_total = 0
        self.num_active = 0

    def add(self, answer: Coroutine[Any, Any, Answer]) -> str:
        """Run `answer` to its end in the background; returns the request_id it can be retrieved under."""
        self._sweep()
        request_id = f"future_{uuid.uuid4().hex[:12]}"
        task = asyncio.create_task(answer, name=request_id)
        task.add_done_callback(self._finished)
        self._entries[request_id] = _Entry(task, self._clock())
        self.num_total += 1
        self.num_active += 1
        return request_id

    def stop(self) -> None:
        """Fail all that have no result, so that nobody waits for one."""
        for entry in self._entries.values():
            entry.task.cancel()

    def failed(self, request_id: str) -> bool:
        entry = self._entries.get(request_id)
        return entry is None or (entry.task.done() and (entry.task.cancelled() or entry.task.exception() is not None))

    async def retrieve(self, request_id: str) -> Answer | Pending | Failure:
        """Wait for a result, but no longer than the hold.

        Raises:
            UnknownId: there never was such an id.
        """
        entry = self._entries.get(request_id)
        if entry is not None and self._is_over(entry):
            self._expire(request_id)
            entry = None
        if entry is None:
            if request_id in self._expired:
                return Failure(f"the result of {request_id} has expired", "server")
            raise UnknownId(f"request_id {request_id} not found")
        if not entry.task.done():
            await asyncio.wait({entry.task}, timeout=self._hold_s)
        if not entry.task.done():
            return Pending()
        if entry.delivered is None:
            entry.delivered = self._clock()
        if entry.task.cancelled():
            return Failure("the server is stopping", "server")
        match entry.task.exception():
            case None:
                return entry.task.result()
            case XorlError() as error:
                return Failure(str(error), error.category)
            case error:
                return Failure(f"internal error: {type(error).__name__}: {error}", "server")

    def _finished(self, task: asyncio.Task[Answer]) -> None:
        self.num_active -= 1
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, XorlError):
            log.error("request failed", request_id=task.get_name(), exc_info=error)

    def _is_over(self, entry: _Entry) -> bool:
        now = self._clock()
        late = entry.delivered is not None and now - entry.delivered > DELIVERED_TTL_S
        return entry.task.done() and (late or now - entry.created > self._ttl_s)

    def _expire(self, request_id: str) -> None:
        del self._entries[request_id]
        self._expired[request_id] = None
        while len(self._expired) > MAX_EXPIRED:
            self._expired.popitem(last=False)

    def _sweep(self) -> None:
        if self._clock() < self._next_sweep:
            return
        self._next_sweep = self._clock() + SWEEP_INTERVAL_S
        for request_id in [name for name, entry in self._entries.items() if self._is_over(entry)]:
            self._expire(request_id)
