"""The control plane's handle on the engine process."""

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Literal

import msgspec
import structlog
import zmq
import zmq.asyncio

from xorl.config import Config
from xorl.engine.commands import AnyCommand, AnyResult, EngineNews, Failed, ModelInfo, StepReport
from xorl.errors import EngineLost, QueueFull, by_name

STOP_TIMEOUT_S = 10.0

log = structlog.get_logger()


class EngineClient:
    """Starts the engine, sends it commands in order and hands each result to its own future."""

    def __init__(self, config: Config, on_failed_start: Callable[[], None] = lambda: None) -> None:
        """`on_failed_start` is called if the engine ends before it was ready, having said why on stderr."""
        self._config = config
        self._on_failed_start = on_failed_start
        self.failed_to_start = False
        self.info: ModelInfo | None = None
        self.last_step: StepReport | None = None
        self.state: Literal["starting", "running", "dead"] = "starting"
        self._pending: dict[int, asyncio.Future[AnyResult]] = {}
        self._last_number = 0
        self._directory = tempfile.TemporaryDirectory(prefix="xorl-")
        self._tasks: list[asyncio.Task[None]] = []
        self._decoder = msgspec.msgpack.Decoder(AnyResult)
        self._news_decoder = msgspec.msgpack.Decoder(EngineNews)

    @property
    def num_queued(self) -> int:
        return len(self._pending)

    async def start(self) -> None:
        """Spawn the engine process; `state` and `info` say when it is ready."""
        addresses = [f"ipc://{self._directory.name}/{name}" for name in ("commands", "results")]
        output_dir = self._config.engine.output_dir
        output_dir.mkdir(parents=True, exist_ok=True)
        self._spill_dir = tempfile.TemporaryDirectory(prefix=".evicted-", dir=output_dir)
        self._commands, self._results = (zmq.asyncio.Context.instance().socket(kind) for kind in (zmq.PUSH, zmq.PULL))
        for end, address in zip((self._commands, self._results), addresses, strict=True):
            end.set_hwm(0)
            end.setsockopt(zmq.LINGER, 0)
            end.bind(address)
        gpus = self._config.engine.gpus
        own, *others = rank_environments(gpus) if gpus > 1 else [dict(os.environ)]
        first = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "xorl.engine.loop", *addresses, self._spill_dir.name),
            stdin=asyncio.subprocess.PIPE,
            env=own,
        )
        assert first.stdin
        first.stdin.write(self._config.model_dump_json().encode())
        first.stdin.close()
        self._processes = [first]
        for environ in others:
            follower = await asyncio.create_subprocess_exec(sys.executable, "-m", "xorl.engine.follower", env=environ)
            self._processes.append(follower)
        watches = [self._watch(rank, process) for rank, process in enumerate(self._processes)]
        self._tasks = [asyncio.create_task(each) for each in (self._receive(), *watches)]

    async def stop(self) -> None:
        """End the engine; what it has not finished fails with EngineLost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        first = self._processes[0]
        if first.returncode is None:
            first.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(first.wait(), STOP_TIMEOUT_S)
        for process in self._processes:  # the others have nothing that could be lost
            _kill(process)
            await process.wait()
        self._lose("the server is stopping")
        self._commands.close()
        self._results.close()
        self._directory.cleanup()
        self._spill_dir.cleanup()

    def submit(self, command: AnyCommand) -> asyncio.Future[AnyResult]:
        """Send a command now; the future has its result, or raises the XorlError that it failed with.

        Raises:
            EngineLost: there is no engine to send it to.
            QueueFull: too many commands wait already.
        """
        if self.state != "running":
            raise EngineLost("the engine is still starting" if self.state == "starting" else "the engine has stopped")
        if len(self._pending) >= self._config.http.max_queued:
            raise QueueFull(f"{len(self._pending)} commands are waiting; try again later")
        self._last_number += 1
        future = asyncio.get_running_loop().create_future()
        self._pending[self._last_number] = future
        self._commands.send_multipart([self._last_number.to_bytes(8), msgspec.msgpack.encode(command)])
        return future

    async def _receive(self) -> None:
        while True:
            number, body = await self._results.recv_multipart()
            if not int.from_bytes(number):
                self._hear(self._news_decoder.decode(body))
                continue
            future = self._pending.pop(int.from_bytes(number))
            if future.done():  # its waiter was cancelled
                continue
            match self._decoder.decode(body):
                case Failed(error=name, message=message):
                    future.set_exception(by_name(name, message))
                case result:
                    future.set_result(result)

    def _hear(self, news: EngineNews) -> None:
        match news:
            case ModelInfo():
                self.info = news
                self.state = "running"
                log.info("engine ready", model=news.path, device=news.device, dtype=news.dtype)
            case StepReport():
                self.last_step = news

    async def _watch(self, rank: int, process: asyncio.subprocess.Process) -> None:
        """Without one of its processes the engine is lost."""
        code = await process.wait()
        if self.state == "dead":
            return
        log.error("engine ended", rank=rank, exit_code=code)
        self.failed_to_start = self.state == "starting"
        self._lose(f"the engine process of rank {rank} ended with exit code {code}")
        for other in self._processes:
            _kill(other)
        if self.failed_to_start:
            self._on_failed_start()

    def _lose(self, reason: str) -> None:
        self.state = "dead"
        pending, self._pending = self._pending, {}
        for future in pending.values():
            with contextlib.suppress(asyncio.InvalidStateError):
                future.set_exception(EngineLost(reason))


def rank_environments(size: int) -> list[dict[str, str]]:
    """What torchrun would set for each of `size` ranks on this machine, which share its cores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max((os.cpu_count() or 1) // size, 1)
    common = {"OMP_NUM_THREADS": str(threads), **os.environ, "WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
