"""Stand-ins for the parts that need torch or another machine; they keep the same promises."""

import asyncio
import contextlib
import datetime
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    CreateModel,
    Datums,
    Done,
    EndpointReport,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    ModelCommand,
    ModelInfo,
    OptimStep,
    OptimStepResult,
    SaveResult,
    SaveSampler,
    SaveWeights,
    Sleep,
    SyncReport,
    SyncWeights,
    UnloadModel,
    WakeUp,
)
from xorl.errors import Asleep, CheckpointError, EngineLost, InvalidRequest, QueueFull, UnknownId
from xorl.sync.receiver import ReceiverError, ServerInfo
from xorl.types import IGNORED_TARGET, MANIFEST, AnyLoss, CausalLmLoss, CrossEntropy, LoraSpec, Manifest

INFO = ModelInfo(
    names=["tiny/base"],
    path="/models/tiny",
    arch="tiny",
    vocab_size=100,
    max_context_length=64,
    full_weights=False,
    device="cpu",
    dtype="float32",
    tied_embeddings=True,
)


class FakeModel:
    """A number that learns: each forward_backward adds the tokens' count, each step moves it into `weight`."""

    def __init__(self, lora: LoraSpec | None) -> None:
        self.lora = lora
        self.gradient = 0.0
        self.weight = 0.0
        self.step = 0


class FakeEngine:
    """Runs commands one by one in order of arrival, when `gate` is open."""

    def __init__(self, info: ModelInfo = INFO) -> None:
        self._ready = info
        self.info: ModelInfo | None = None
        self.state: Literal["starting", "running", "dead"] = "starting"
        self.gate = asyncio.Event()
        self.gate.set()
        self.commands: list[AnyCommand] = []
        self.models: dict[str, FakeModel] = {}
        self.max_queued = 1000
        self.failing_endpoints: set[int] = set()
        self.synced: list[float] = []
        self._queue: asyncio.Queue[tuple[AnyCommand, asyncio.Future[AnyResult]]] = asyncio.Queue()
        self._pending: list[asyncio.Future[AnyResult]] = []
        self._worker: asyncio.Task[None] | None = None
        self._asleep = False

    @property
    def num_queued(self) -> int:
        return sum(not future.done() for future in self._pending)

    async def start(self) -> None:
        self.become_ready()

    def become_ready(self) -> None:
        self.info, self.state = self._ready, "running"
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._worker:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        self.lose("the server is stopping")

    def lose(self, reason: str) -> None:
        self.state = "dead"
        for future in self._pending:
            if not future.done():
                future.set_exception(EngineLost(reason))

    def submit(self, command: AnyCommand) -> asyncio.Future[AnyResult]:
        if self.state != "running":
            raise EngineLost("the engine is still starting" if self.state == "starting" else "the engine has stopped")
        if self.num_queued >= self.max_queued:
            raise QueueFull(f"{self.num_queued} commands are waiting")
        future = asyncio.get_running_loop().create_future()
        self.commands.append(command)
        self._pending.append(future)
        self._queue.put_nowait((command, future))
        return future

    def sent(self, kind: type) -> list:
        return [command for command in self.commands if isinstance(command, kind)]

    async def _work(self) -> None:
        while True:
            await self.gate.wait()
            command, future = await self._queue.get()
            await self.gate.wait()
            if future.done():  # lost in the meantime
                continue
            try:
                result = self._run(command)
            except (InvalidRequest, UnknownId, Asleep, CheckpointError) as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _run(self, command: AnyCommand) -> AnyResult:
        if isinstance(command, Sleep | WakeUp):
            self._asleep = isinstance(command, Sleep)
            return Done()
        if self._asleep and not isinstance(command, UnloadModel):
            raise Asleep("the model is asleep: POST /wake_up first")
        if isinstance(command, CreateModel):
            if (command.lora is None) != self._ready.full_weights:
                raise InvalidRequest("lora_config: wrong kind of model")
            if command.lora and command.lora.seed == 666:
                raise InvalidRequest("lora_config.seed: an unlucky number")
            self.models.setdefault(command.model_id, FakeModel(command.lora))
            return Done()
        assert isinstance(command, ModelCommand)
        if command.model_id not in self.models:
            raise UnknownId(f"model_id {command.model_id} is not registered")
        return self._run_on(self.models[command.model_id], command)

    def _run_on(self, model: FakeModel, command: ModelCommand) -> AnyResult:
        match command:
            case Forward() | ForwardBackward():
                result = forward(command.datums, command.loss, model.weight)
                if isinstance(command, ForwardBackward):
                    model.gradient += result.metrics["valid_tokens:sum"]
                return result
            case OptimStep():
                grad_norm, model.gradient = model.gradient, 0.0
                model.weight += command.adam.learning_rate * grad_norm
                model.step += 1
                return OptimStepResult(grad_norm=grad_norm, learning_rate=command.adam.learning_rate, step=model.step)
            case UnloadModel():
                del self.models[command.model_id]
                return Done()
            case SaveWeights():
                return self._save(model, command, "training", command.user_metadata)
            case SaveSampler():
                return self._save(model, command, "sampler", None)
            case LoadWeights():
                return load(model, command)
            case SyncWeights():
                self.synced.append(model.weight)
                return self._sync(command)
        raise AssertionError(command)

    def _save(
        self,
        model: FakeModel,
        command: SaveWeights | SaveSampler,
        kind: Literal["training", "sampler"],
        user_metadata: dict[str, str] | None,
    ) -> SaveResult:
        directory = Path(command.directory)
        if directory.exists() and not command.replace:
            raise InvalidRequest(f"path: checkpoint {directory.name} exists already; choose another name")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "weight").write_text(str(model.weight))
        manifest = Manifest(
            kind=kind,
            model_id=command.model_id,
            name=command.name,
            base_model=self._ready.path,
            time=datetime.datetime.now(datetime.UTC).isoformat(),
            step=model.step,
            lora=model.lora,
            size_bytes=4096,
            files={},
            user_metadata=user_metadata,
        )
        (directory / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return SaveResult(manifest.size_bytes)

    def _sync(self, command: SyncWeights) -> SyncReport:
        reports = [
            EndpointReport(e.host, e.port, e.port not in self.failing_endpoints, "ok") for e in command.endpoints
        ]
        return SyncReport(0.1, 1000, 10, 1, reports, {"send": 0.1})


def forward(datums: Datums, loss: AnyLoss, weight: float) -> ForwardResult:
    """Log-probability -(1 + target % 5) + weight, and cross-entropy or nothing of a loss."""
    targets_TK = np.frombuffer(datums.targets, np.int32).reshape(-1, datums.num_targets)
    logprobs_TK = (-(1.0 + targets_TK % 5) + weight).astype(np.float32)
    valid_TK = targets_TK != IGNORED_TARGET
    weights_TK = valid_TK.astype(np.float32)
    if "weights" in datums.loss_inputs:
        weights_TK *= np.frombuffer(datums.loss_inputs["weights"], np.float32).reshape(targets_TK.shape)
    loss_T = -(logprobs_TK * weights_TK).sum(axis=1)
    supervised = isinstance(loss, CrossEntropy | CausalLmLoss)
    num_valid = int((weights_TK != 0).any(axis=1).sum())
    total = float(loss_T.sum())
    return ForwardResult(
        logprobs=logprobs_TK.tobytes(),
        elementwise_loss=loss_T.astype(np.float32).tobytes() if supervised else None,
        metrics={"loss:sum": total, "loss:mean": total / max(num_valid, 1), "valid_tokens:sum": float(num_valid)},
    )


def load(model: FakeModel, command: LoadWeights) -> Done:
    directory = Path(command.directory)
    if not (directory / MANIFEST).exists():
        raise CheckpointError(f"{directory.name}: there is no such checkpoint")
    manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    if manifest.lora and model.lora and manifest.lora.rank != model.lora.rank:
        raise CheckpointError(f"{manifest.name}: its lora rank is {manifest.lora.rank}, the model's {model.lora.rank}")
    model.weight = float((directory / "weight").read_text())
    model.step = manifest.step if command.optimizer else 0
    model.gradient = 0.0
    return Done()


class FakeReceivers:
    """Inference servers on any port of this machine: port 1 to 9 are down, ports ending in 9 refuse adapters."""

    def __init__(self) -> None:
        self.adapters: dict[int, dict[str, str]] = {}
        self.from_disk: dict[int, str] = {}
        self.log: list[tuple[int, str, str]] = []
        self.down: set[int] = set(range(10))
        self.versions: dict[int, str] = {}
        self.keys: dict[int, str | None] = {}

    def connect(self, host: str, port: int, api_key: str | None) -> "FakeReceiver":
        self.keys[port] = api_key
        return FakeReceiver(self, port)


class FakeReceiver:
    def __init__(self, servers: FakeReceivers, port: int) -> None:
        self._servers = servers
        self._port = port

    def alive(self) -> bool:
        return self._port not in self._servers.down

    def server_info(self) -> ServerInfo:
        return ServerInfo(model_path="tiny/base", tp_size=1)

    def weight_version(self) -> str | None:
        return self._servers.versions.get(self._port)

    def load_adapter(self, name: str, directory: str) -> None:
        self._do("load", name, lambda: self._servers.adapters.setdefault(self._port, {}).update({name: directory}))

    def unload_adapter(self, name: str) -> None:
        self._do("unload", name, lambda: self._servers.adapters[self._port].pop(name))

    def update_from_disk(self, directory: str, version: str) -> None:
        self._do("update", directory, lambda: self._servers.from_disk.update({self._port: directory}))
        self._servers.versions[self._port] = version

    def _do(self, what: str, name: str, effect: Callable[[], object]) -> None:
        if not self.alive() or self._port % 10 == 9:
            raise ReceiverError(f"127.0.0.1:{self._port}: refused")
        effect()
        self._servers.log.append((self._port, what, name))
