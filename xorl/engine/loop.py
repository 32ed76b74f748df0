"""Runs the engine process: prepares one step, computes the one before and delivers the one before that, at one time.

Started by `xorl.engine.client` as `python -m xorl.engine.loop COMMANDS RESULTS SPILL_DIR`, the first two addresses of
ZeroMQ, with the configuration as JSON on stdin.
A message is [number, command] one way and [number, result] the other; number 0 carries the ModelInfo, then a
StepReport after each step.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue
from typing import NamedTuple

import msgspec
import structlog
import torch
import zmq

from xorl.config import Config
from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    Failed,
    Forward,
    ForwardBackward,
    OptimStep,
    Sleep,
    StepReport,
    WakeUp,
)
from xorl.engine.engine import Engine, Prepared
from xorl.engine.forward import Deferred
from xorl.engine.scheduler import Scheduler, Work
from xorl.engine.trace import Span, Stage, Trace
from xorl.errors import XorlError

NUMBER_OF_ENGINE = 0
IDLE_CHECK_S = 1.0

QUANTA_PER_BATCH = 16
"""Models that a full batch is divided among, if all of them have as much to compute."""

OPTIM_TOKENS = 64
"""What an optimizer step is charged, in tokens: about as many as take its time."""

log = structlog.get_logger()

Numbered = tuple[int, AnyCommand]


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


class EngineLoop:
    """Three threads, of which each owns what it touches: the sockets, and by the engine's rules the models.

    A step is picked when the one before it begins to compute: the latest moment at which preparing it takes no time
    from the device, so that it has everything that has arrived until then.
    """

    def __init__(
        self,
        engine: Engine,
        commands: zmq.Socket[bytes],
        results: zmq.Socket[bytes],
        trace: Trace,
    ) -> None:
        """`commands` is read and `results` written, each by one thread."""
        self._engine = engine
        self._commands = commands
        self._results = results
        self._trace = trace
        quantum = max(engine.settings.max_batch_tokens // QUANTA_PER_BATCH, 1)
        self._scheduler: Scheduler[Numbered] = Scheduler(quantum, engine.settings.weight_of)
        self._decoder = msgspec.msgpack.Decoder(AnyCommand)
        self._barrier: Numbered | None = None
        self._num_steps = 0
        self._room = threading.Semaphore()  # for one step between prepare and compute
        self._prepared: Queue[Step | None] = Queue()  # None comes last
        self._computed: Queue[Step | None] = Queue(maxsize=1)

    def run(self, wanted: Callable[[], bool]) -> None:
        """Serve for as long as `wanted`, asked at least once a second."""
        stages = self._compute, self._deliver
        threads = [threading.Thread(target=_or_end, args=[stage], daemon=True) for stage in stages]
        for thread in threads:
            thread.start()
        while wanted():
            if not self._room.acquire(timeout=IDLE_CHECK_S):
                continue
            self._receive(wait=not len(self._scheduler))
            if commands := self._pick():
                self._prepared.put(self._prepare(commands))
            else:
                self._room.release()
        self._prepared.put(None)
        for thread in threads:
            thread.join()

    def _receive(self, *, wait: bool) -> None:
        """Queue every command that has arrived; with `wait`, give the first one some time to.

        One for all models comes after what arrived before it, and before what arrives later.
        """
        timeout_ms = int(1000 * IDLE_CHECK_S) if wait else 0
        while self._barrier is None and self._commands.poll(timeout_ms):
            number, body = self._commands.recv_multipart()
            command: AnyCommand = self._decoder.decode(body)
            numbered = int.from_bytes(number), command
            if isinstance(command, Sleep | WakeUp):
                self._barrier = numbered
            else:
                self._scheduler.add(command.model_id, self._work(numbered))
            timeout_ms = 0

    def _work(self, numbered: Numbered) -> Work[Numbered]:
        command = numbered[1]
        match command:
            case ForwardBackward():
                shares = None if self._engine.base.full else "forward"  # their gradients go to one place
                return Work(numbered, num_tokens(command), shares)
            case Forward():
                return Work(numbered, num_tokens(command), "forward")
            case OptimStep():
                return Work(numbered, OPTIM_TOKENS, "optim_step")
            case _:
                return Work(numbered, OPTIM_TOKENS)

    def _pick(self) -> Sequence[Numbered]:
        commands = self._scheduler.next(self._engine.forward.budget.tokens, self._engine.settings.max_resident_adapters)
        if not commands and self._barrier is not None:
            commands, self._barrier = [self._barrier], None
        return commands

    def _prepare(self, commands: Sequence[Numbered]) -> Step:
        start = time.perf_counter()
        self._num_steps += 1
        step = Step(self._num_steps, commands, self._engine.prepare([command for _, command in commands]))
        self._record("prepare", step, start)
        return step

    def _compute(self) -> None:
        for step in iter(self._prepared.get, None):
            self._room.release()
            start = time.perf_counter()
            outcomes = self._engine.compute(step.prepared)
            peak_bytes = self._engine.forward.peak_bytes if step.prepared.packed else 0
            step = step._replace(outcomes=outcomes, peak_bytes=peak_bytes)
            self._record("compute", step, start)
            self._computed.put(step)
        self._computed.put(None)

    def _deliver(self) -> None:
        self._send(NUMBER_OF_ENGINE, self._engine.base.info())
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

    def _send(self, number: int, message: msgspec.Struct) -> None:
        self._results.send_multipart([number.to_bytes(8), msgspec.msgpack.encode(message)])

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


def _or_end(stage: Callable[[], None]) -> None:
    """Run a stage; if it fails, nothing would move any more, so the process ends and the control plane sees it."""
    try:
        stage()
    except Exception:
        log.exception("engine stage failed", stage=stage.__name__)
        os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides when we end
    config = Config.model_validate_json(sys.stdin.buffer.read())
    settings = config.engine
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    commands, results = (zmq.Context.instance().socket(kind) for kind in (zmq.PULL, zmq.PUSH))
    for socket, address in zip((commands, results), sys.argv[1:3], strict=True):
        socket.set_hwm(0)
        socket.connect(address)
    try:
        engine = Engine(config, Path(sys.argv[3]))
    except XorlError as error:
        sys.exit(f"xorl: {error}")
    trace, parent = Trace(), os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    loop = EngineLoop(engine, commands, results, trace)
    with contextlib.suppress(SystemExit):
        _or_end(lambda: loop.run(lambda: os.getppid() == parent))
    if settings.trace_path:
        trace.write(Path(settings.trace_path))
    engine.close()
    os._exit(0)  # the other threads may be in the middle of something that nobody waits for


if __name__ == "__main__":
    main()
