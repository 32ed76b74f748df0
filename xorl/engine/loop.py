"""Runs the first rank of the engine: hears what clients want, chooses what runs together, and answers.

Started by `xorl.engine.client` as `python -m xorl.engine.loop COMMANDS RESULTS SPILL_DIR`, the first two addresses of
ZeroMQ, with the configuration as JSON on stdin.
A message is [number, command] one way and [number, result] the other; number 0 carries the ModelInfo, then a
StepReport after each step.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog
import torch
import zmq

from xorl.config import Config, EngineConfig
from xorl.engine.commands import AnyCommand, Forward, ForwardBackward, OptimStep, Sleep, WakeUp
from xorl.engine.engine import Engine
from xorl.engine.ranks import Order, join
from xorl.engine.scheduler import Scheduler, Work
from xorl.engine.stages import NUMBER_OF_ENGINE, Numbered, Stages, num_tokens, or_end
from xorl.engine.trace import Trace
from xorl.errors import XorlError

IDLE_CHECK_S = 1.0

QUANTA_PER_BATCH = 16
"""Models that a full batch is divided among, if all of them have as much to compute."""

OPTIM_TOKENS = 64
"""What an optimizer step is charged, in tokens: about as many as take its time."""


class EngineLoop:
    """Chooses each step when there is room for it, and tells the other ranks."""

    def __init__(
        self,
        engine: Engine,
        commands: zmq.Socket[bytes],
        results: zmq.Socket[bytes],
        trace: Trace,
    ) -> None:
        """`commands` is read and `results` written, each by one thread at a time."""
        self._engine = engine
        self._commands = commands
        self._results = results
        self._stages = Stages(engine, trace, self._send)
        quantum = max(engine.settings.max_batch_tokens // QUANTA_PER_BATCH, 1)
        self._scheduler: Scheduler[Numbered] = Scheduler(quantum, engine.settings.weight_of)
        self._decoder = msgspec.msgpack.Decoder(AnyCommand)
        self._barrier: Numbered | None = None

    def run(self, wanted: Callable[[], bool]) -> None:
        """Serve for as long as `wanted`, asked at least once a second."""
        ranks, budget = self._engine.base.ranks, self._engine.forward.budget
        self._send(NUMBER_OF_ENGINE, self._engine.base.info())
        self._stages.start()
        while wanted():
            if not self._stages.take_room(IDLE_CHECK_S):
                continue
            self._receive(wait=not len(self._scheduler))
            max_tokens = budget.tokens
            commands = self._pick(max_tokens)
            ranks.tell(Order(max_tokens, [command for _, command in commands]))
            if commands:
                self._stages.take(commands, max_tokens)
            else:
                self._stages.give_room()
        self._stages.finish()

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

    def _pick(self, max_tokens: int) -> Sequence[Numbered]:
        commands = self._scheduler.next(max_tokens, self._engine.settings.max_resident_adapters)
        if not commands and self._barrier is not None:
            commands, self._barrier = [self._barrier], None
        return commands

    def _send(self, number: int, message: msgspec.Struct) -> None:
        self._results.send_multipart([number.to_bytes(8), msgspec.msgpack.encode(message)])


def set_up(settings: EngineConfig) -> None:
    """What each process of the engine does first."""
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides when we end
    config = Config.model_validate_json(sys.stdin.buffer.read())
    set_up(config.engine)
    commands, results = (zmq.Context.instance().socket(kind) for kind in (zmq.PULL, zmq.PUSH))
    for socket, address in zip((commands, results), sys.argv[1:3], strict=True):
        socket.set_hwm(0)
        socket.connect(address)
    try:
        ranks, spill_dir = join(), Path(sys.argv[3])
        ranks.from_first(lambda: (config, spill_dir))
        engine = Engine(config, spill_dir, ranks)
    except XorlError as error:
        sys.exit(f"xorl: {error}")
    trace, parent = Trace(), os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    loop = EngineLoop(engine, commands, results, trace)
    with contextlib.suppress(SystemExit):
        or_end(lambda: loop.run(lambda: os.getppid() == parent))
    if config.engine.trace_path:
        trace.write(Path(config.engine.trace_path))
    engine.close()
    os._exit(0)  # the other threads may be in the middle of something that nobody waits for


if __name__ == "__main__":
    main()
