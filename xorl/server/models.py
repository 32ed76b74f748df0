"""Knows which models there are, and passes their commands to the engine in the order in which they came."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from xorl.engine.commands import AnyCommand, AnyResult, CreateModel, ModelInfo, UnloadModel
from xorl.errors import EngineLost, InvalidRequest
from xorl.server.metrics import Metrics
from xorl.server.store import Run, Store
from xorl.types import AdamParams, LoraSpec

DEFAULT = "default"


class Engine(Protocol):
    """The control plane's view of the engine process."""

    info: ModelInfo | None
    state: Literal["starting", "running", "dead"]

    @property
    def num_queued(self) -> int: ...
    def submit(self, command: AnyCommand) -> asyncio.Future[AnyResult]: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Accepted(NamedTuple):
    """A request that was given a request_id."""

    seq_id: int
    content: bytes  # a digest of the call and its body
    request_id: str


@dataclass
class Model:
    """One model id. `created` is None for `default` until its first command."""

    model_id: str
    lora: LoraSpec | None
    adam: AdamParams
    created: asyncio.Future[AnyResult] | None = None
    last_activity: float = field(default_factory=time.time)
    _accepted: dict[int, Accepted] = field(default_factory=dict)
    _latest: Accepted | None = None

    def earlier(self, seq_id: int | None, content: bytes) -> str | None:
        """The request_id of this very request, if it came before.

        tinker's model ids and seq_ids are never used twice, so that a pair names one request for ever. xorl-client
        counts from 1 again with each client object, so only the repeat of the latest request is one.

        Raises:
            InvalidRequest: tinker's (model_id, seq_id) came with other content.
        """
        if seq_id is None:
            return None
        if ":" not in self.model_id:
            latest = self._latest
            return latest.request_id if latest and latest[:2] == (seq_id, content) else None
        known = self._accepted.get(seq_id)
        if known is None:
            return None
        if known.content != content:
            raise InvalidRequest(f"seq_id: {seq_id} of {self.model_id} was used for another request")
        return known.request_id

    def accept(self, seq_id: int | None, content: bytes, request_id: str) -> None:
        if seq_id is None:
            return
        self._latest = Accepted(seq_id, content, request_id)
        if ":" in self.model_id:
            self._accepted[seq_id] = self._latest

    def forget(self) -> None:
        """A new client may count from 1 again."""
        self._latest = None


class Models:
    """The registered models by id; `default` is always one of them."""

    def __init__(self, engine: Engine, store: Store, metrics: Metrics) -> None:
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._models: dict[str, Model] = {}
        self.current: str | None = None

    @property
    def info(self) -> ModelInfo:
        """What the engine serves.

        Raises:
            EngineLost: it isn't ready, or has ended.
        """
        if self._engine.info is None or self._engine.state != "running":
            starting = self._engine.state == "starting"
            raise EngineLost("the engine is still starting" if starting else "the engine has stopped")
        return self._engine.info

    def __getitem__(self, model_id: str) -> Model:
        info = self.info
        if model_id == DEFAULT and model_id not in self._models:
            self._models[model_id] = Model(model_id, None if info.full_weights else LoraSpec(), AdamParams())
        if model_id not in self._models:
            raise InvalidRequest(f"model_id: {model_id} is not registered; there are {', '.join(self.ids())}")
        return self._models[model_id]

    def ids(self) -> list[str]:
        return [DEFAULT, *(model_id for model_id in self._models if model_id != DEFAULT)]

    def live(self) -> list[Model]:
        """Those that the engine has been asked to create."""
        return [model for model in self._models.values() if model.created is not None]

    def find(self, model_id: str) -> Model | None:
        """The model, if it is registered and its creation was asked for."""
        model = self._models.get(model_id)
        return model if model and model.created else None

    def unnamed(self) -> Model:
        """The model that a call means which names none, as xorl-client's syncs do: the only live one, else `default`.

        Raises:
            InvalidRequest: several models are live and `default` is not.
        """
        live = {model.model_id: model for model in self.live()}
        if len(live) > 1 and DEFAULT not in live:
            raise InvalidRequest(f"model_id: missing, and several models are live: {', '.join(live)}")
        return next(iter(live.values())) if len(live) == 1 else self[DEFAULT]

    def create(
        self, model_id: str, lora: LoraSpec | None, adam: AdamParams, user_metadata: dict[str, str] | None = None
    ) -> Model:
        """Register a model and have the engine create it; unregistered again if that fails."""
        model = Model(model_id, lora, adam)
        self._create(model, user_metadata)
        self._models[model_id] = model
        return model

    def send(self, model: Model, command: AnyCommand) -> asyncio.Future[AnyResult]:
        """Submit a command of a model, after the creation of `default` where that is still to be done."""
        if model.created is None:
            self._create(model, None)
        future = self._submit(command)
        model.last_activity = time.time()
        self.current = model.model_id
        self._store.touch_run(model.model_id)
        return future

    def send_global(self, command: AnyCommand) -> asyncio.Future[AnyResult]:
        return self._submit(command)

    def unload(self, model: Model) -> asyncio.Future[AnyResult]:
        """Unregister a model now; what it was asked before still runs. `default` starts anew when next used."""
        future = self.send(model, UnloadModel(model_id=model.model_id))
        del self._models[model.model_id]
        self.current = None
        return future

    def _create(self, model: Model, user_metadata: dict[str, str] | None) -> None:
        session_id, separator, _ = model.model_id.partition(":")
        rank = model.lora.rank if model.lora else None
        session = session_id if separator else None
        self._store.put_run(Run(model.model_id, session, self.info.names[0], rank, time.time(), user_metadata))
        model.created = self._submit(CreateModel(model_id=model.model_id, lora=model.lora))
        model.created.add_done_callback(lambda created: self._forget_failed(model, created))

    def _forget_failed(self, model: Model, created: asyncio.Future[AnyResult]) -> None:
        failed = created.cancelled() or created.exception() is not None
        if failed and self._models.get(model.model_id) is model:
            del self._models[model.model_id]

    def _submit(self, command: AnyCommand) -> asyncio.Future[AnyResult]:
        future = self._engine.submit(command)
        self._metrics.follow(type(command).__name__, future)
        return future
