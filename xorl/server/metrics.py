"""Counts what the server does, for Prometheus."""

import asyncio
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from xorl.engine.commands import AnyResult
from xorl.errors import XorlError

SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """A registry of its own for each app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("xorl_http_requests", "HTTP requests", ["path", "status"], registry=self._registry)
        self.tokens = Counter("xorl_tokens", "Tokens accepted", ["call"], registry=self._registry)
        self._commands = Counter("xorl_commands", "Finished commands", ["command", "outcome"], registry=self._registry)
        self._seconds = Histogram(
            "xorl_command_seconds", "Submit to result", ["command"], buckets=SECONDS, registry=self._registry
        )
        self._running = Gauge("xorl_engine_running", "1 while the engine runs", registry=self._registry)
        self._queued = Gauge("xorl_engine_queued", "Commands in the engine", registry=self._registry)
        self._active = Gauge("xorl_active_futures", "Futures without a result", registry=self._registry)

    def follow(self, command: str, future: asyncio.Future[AnyResult]) -> None:
        """Count and time a command when it ends."""
        started = time.perf_counter()

        def count(done: asyncio.Future[AnyResult]) -> None:
            error = None if done.cancelled() else done.exception()
            outcome = "ok" if error is None else error.category if isinstance(error, XorlError) else "server"
            self._commands.labels(command, outcome).inc()
            self._seconds.labels(command).observe(time.perf_counter() - started)

        future.add_done_callback(count)

    def page(self, *, running: bool, queued: int, active: int) -> bytes:
        self._running.set(running)
        self._queued.set(queued)
        self._active.set(active)
        return generate_latest(self._registry)
