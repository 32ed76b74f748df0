"""Prepares one step, computes the one before and delivers the one before that, at one time."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from queue import Queue
from typing import NamedTuple

import structlog

from xorl.engine.commands import AnyCommand, AnyResult, EngineNews, Failed, Forward, ForwardBackward, StepReport
from xorl.engine.engine import Engine, Prepared
from xorl.engine.forward import Deferred
from xorl.engine.trace import Span, Stage, Trace
from xorl.errors import XorlError

NUMBER_OF_ENGINE = 0
"""Under which the engine speaks for itself; commands have numbers above."""

log = structlog.get_logger()

Numbered = tuple[int, AnyCommand]
Send = Callable[[int, AnyResult | EngineNews], None]


class Step(NamedTuple):
    """Commands that run together, on their way through the stages; `outcomes` is empty until they are computed."""

    number: int
    commands: Sequence[Numbered]
    prepared: Prepared
    outcomes: Sequence[Deferred] = ()
    peak_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens(command) for _, command in self.commands)


class Stages:
    """Three threads, of which each owns what it touches, by the engine's rules; the caller's is the one that prepares.

    A step is to be chosen when there is room for it, which is when the one before it begins to compute: the latest
    moment at which preparing it takes no time from the device, so that it has everything that has arrived until then.
    """

    def __init__(self, engine: Engine, trace: Trace, send: Send) -> None:
        """`send` gets each command's result, and a report after each step of requests, on the thread that delivers."""
        self._engine = engine
        self._trace = trace
        self._send = send
        self._num_steps = 0
        self._room = threading.Semaphore()  # for one step between prepare and compute
        self._prepared: Queue[Step | None] = Queue()  # None comes last
        self._computed: Queue[Step | None] = Queue(maxsize=1)
        self._threads = [
            threading.Thread(target=or_end, args=[stage], daemon=True) for stage in (self._compute, self._deliver)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until all that was taken is delivered."""
        self._prepared.put(None)
        for thread in self._threads:
            thread.join()

    def take_room(self, timeout_s: float | None = None) -> bool:
        """Wait until a step can be taken; who then has none gives the room back."""
        return self._room.acquire(timeout=timeout_s)

    def give_room(self) -> None:
        self._room.release()

    def take(self, commands: Sequence[Numbered], max_tokens: int) -> None:
        """Prepare a step, of batches of at most `max_tokens`, and let it run."""
        start = time.perf_counter()
        self._num_steps += 1
        prepared = self._engine.prepare([command for _, command in commands], max_tokens)
        step = Step(self._num_steps, commands, prepared)
        self._record("prepare", step, start)
        self._prepared.put(step)

    def _compute(self) -> None:
        for step in iter(self._prepared.get, None):
            self.give_room()
            start = time.perf_counter()
            outcomes = self._engine.compute(step.prepared)
            peak_bytes = self._engine.forward.peak_bytes if step.prepared.packed else 0
            step = step._replace(outcomes=outcomes, peak_bytes=peak_bytes)
            self._record("compute", step, start)
            self._computed.put(step)
        self._computed.put(None)

    def _deliver(self) -> None:
        for step in iter(self._computed.get, None):
            start = time.perf_counter()
            for (number, command), outcome in zip(step.commands, step.outcomes, strict=True):
                self._send(number, _result(command, outcome))
            if step.prepared.packed:
                report = StepReport(
                    num_requests=len(step.commands), num_tokens=step.num_tokens, peak_bytes=step.peak_bytes
                )
                self._send(NUMBER_OF_ENGINE, report)
            self._record("deliver", step, start)

    def _record(self, stage: Stage, step: Step, start: float) -> None:
        name = type(step.commands[0][1]).__name__
        span = Span(
            stage, step.number, start, time.perf_counter(), name, len(step.commands), step.num_tokens, step.peak_bytes
        )
        self._trace.add(span)


def num_tokens(command: AnyCommand) -> int:
    return len(command.datums.tokens) // 4 if isinstance(command, ForwardBackward | Forward) else 0  # int32


def _result(command: AnyCommand, outcome: Deferred) -> AnyResult:
    try:
        return outcome()
    except XorlError as error:
        return Failed(type(error).__name__, str(error))
    except Exception as error:  # one command's failure is its own: the engine goes on
        log.exception("command failed", command=type(command).__name__)
        return Failed("InternalError", f"{type(error).__name__}: {error}")


def or_end(stage: Callable[[], None]) -> None:
    """Run a stage; if it fails, nothing would move any more, so the process ends and the control plane sees it."""
    try:
        stage()
    except Exception:
        log.exception("engine stage failed", stage=stage.__name__)
        os._exit(1)
