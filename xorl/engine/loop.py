"""Runs the engine process: receives commands, takes the scheduler's pick, sends back results.

Started by `xorl.engine.client` as `python -m xorl.engine.loop ADDRESS SPILL_DIR`, with the configuration as JSON on
stdin.
A message is [number, command] one way and [number, result] the other; number 0 carries the ModelInfo.
"""

import os
import signal
import sys
from pathlib import Path

import msgspec
import structlog
import torch
import zmq

from xorl.config import Config
from xorl.engine.commands import AnyCommand, AnyResult, Failed, Forward, ForwardBackward, Sleep, WakeUp
from xorl.engine.engine import Engine
from xorl.engine.scheduler import Scheduler
from xorl.errors import XorlError

READY = 0
IDLE_CHECK_MS = 1000

log = structlog.get_logger()


class EngineLoop:
    """Commands in, results out, one at a time."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], quantum: int) -> None:
        self._engine = engine
        self._socket = socket
        self._scheduler: Scheduler[tuple[int, AnyCommand]] = Scheduler(quantum)
        self._decoder = msgspec.msgpack.Decoder(AnyCommand)
        self._barrier: tuple[int, AnyCommand] | None = None

    def run(self) -> None:
        """Serve until the parent process is gone."""
        parent = os.getppid()
        self._send(READY, self._engine.base.info())
        while os.getppid() == parent:
            self._receive(wait=not len(self._scheduler))
            picked = self._scheduler.next()
            if picked is None:
                picked, self._barrier = self._barrier, None
            if picked is not None:
                number, command = picked
                self._send(number, self._run(command))

    def _receive(self, *, wait: bool) -> None:
        """Queue every command that has arrived; with `wait`, give the first one some time to.

        One for all models comes after what arrived before it, and before what arrives later.
        """
        timeout_ms = IDLE_CHECK_MS if wait else 0
        while self._barrier is None and self._socket.poll(timeout_ms):
            number, body = self._socket.recv_multipart()
            command: AnyCommand = self._decoder.decode(body)
            numbered = int.from_bytes(number), command
            if isinstance(command, Sleep | WakeUp):
                self._barrier = numbered
            else:
                self._scheduler.add(command.model_id, numbered, cost_tokens(command))
            timeout_ms = 0

    def _run(self, command: AnyCommand) -> AnyResult:
        try:
            return self._engine.run(command)
        except XorlError as error:
            return Failed(type(error).__name__, str(error))
        except Exception as error:  # one command's failure is its own: the engine goes on
            log.exception("command failed", command=type(command).__name__)
            return Failed("InternalError", f"{type(error).__name__}: {error}")

    def _send(self, number: int, message: msgspec.Struct) -> None:
        self._socket.send_multipart([number.to_bytes(8), msgspec.msgpack.encode(message)])


def cost_tokens(command: AnyCommand) -> int:
    if isinstance(command, ForwardBackward | Forward):
        return len(command.datums.tokens) // 4  # int32
    return 0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides when we end
    config = Config.model_validate_json(sys.stdin.buffer.read())
    if config.engine.torch_threads:
        torch.set_num_threads(config.engine.torch_threads)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    try:
        engine = Engine(config, Path(sys.argv[2]))
    except XorlError as error:
        sys.exit(f"xorl: {error}")
    try:
        EngineLoop(engine, socket, config.engine.max_batch_tokens).run()
    finally:
        engine.close()


if __name__ == "__main__":
    main()
