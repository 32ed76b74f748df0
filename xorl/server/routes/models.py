"""Serves the life of models and sessions."""

import time
import uuid

import msgspec
from fastapi import APIRouter

from xorl.engine.commands import SaveWeights
from xorl.errors import EngineLost, InvalidRequest, QueueFull, UnknownId, XorlError
from xorl.server import schema
from xorl.server.answers import JsonAnswer
from xorl.server.checkpoints import CheckpointRef, new_name
from xorl.server.lora import adam_defaults, check_base_model, lora_spec
from xorl.server.models import DEFAULT, Model
from xorl.server.plane import ControlPlane, Plane, then
from xorl.server.requests import StrictRoute

router = APIRouter(prefix="/api/v1", tags=["models"], route_class=StrictRoute)


@router.post("/create_model")
async def create_model(body: schema.CreateModelRequest, plane: Plane) -> schema.FutureRef:
    """Start a model. One that exists is left as it is, if it is what was asked for."""
    model_id = body.model_id or body.session_id or DEFAULT
    if body.model_seq_id is not None:
        model_id = tinker_model_id(body.session_id, body.model_seq_id)
    model = ensure_model(plane, model_id, body)
    assert model.created is not None
    answer = JsonAnswer({"model_id": model_id, "type": "create_model"})
    return schema.FutureRef(request_id=plane.futures.add(then(model.created, lambda _: answer)), model_id=model_id)


def tinker_model_id(session_id: str | None, model_seq_id: int) -> str:
    """The id that tinker's client computes for itself."""
    if session_id is None or ":" in session_id:
        raise InvalidRequest("session_id: model_seq_id needs the id of a session")
    return f"{session_id}:train:{model_seq_id}"


def ensure_model(plane: ControlPlane, model_id: str, body: schema.CreateModelRequest) -> Model:
    """The model of this id, created if there is none.

    Raises:
        InvalidRequest: naming the field that cannot be had, or that differs from the existing model's.
    """
    info = plane.models.info
    check_base_model(body.base_model, info)
    adam, asked_adam = adam_defaults(body.optimizer_config)
    lora, asked_lora = None, frozenset[str]()
    if info.full_weights:
        check_full_weights_id(model_id)
    else:
        lora, asked_lora = lora_spec(body.lora_config or schema.LoraConfig(), plane.config.engine)
    existing = plane.models.find(model_id)
    if existing is None:
        return plane.models.create(model_id, lora, adam, body.user_metadata)
    _check_same("lora_config", asked_lora, lora, existing.lora)
    _check_same("optimizer_config", asked_adam, adam, existing.adam)
    existing.forget()
    return existing


def check_full_weights_id(model_id: str) -> None:
    if model_id != DEFAULT:
        raise InvalidRequest(f"model_id: this server trains full weights, as the one model `{DEFAULT}`, not {model_id}")


def _check_same(
    section: str, asked: frozenset[str], wanted: msgspec.Struct | None, existing: msgspec.Struct | None
) -> None:
    for name in sorted(asked):
        is_, should_be = getattr(existing, name), getattr(wanted, name)
        if is_ != should_be:
            raise InvalidRequest(f"{section}.{name}: the model exists with {is_!r}, not {should_be!r}")


@router.post("/unload_model")
async def unload_model(body: schema.ModelRequest, plane: Plane) -> schema.FutureRef:
    """End a model after all it has been asked for. `default` starts anew with its next call."""
    model = plane.models[body.model_id]
    if model.lora is None:
        raise InvalidRequest("model_id: full weights cannot be unloaded")
    answer = JsonAnswer({"model_id": body.model_id, "type": "unload_model"})
    future = plane.models.unload(model)
    return schema.FutureRef(request_id=plane.futures.add(then(future, lambda _: answer)), model_id=body.model_id)


@router.post("/kill_session")
async def kill_session(body: schema.KillSessionRequest, plane: Plane) -> schema.KillSessionResponse:
    """End a model, saving it first if asked to; if that fails it is kept. So is `default`, unless it is to be reset."""
    _ = plane.models.info  # without an engine there is nothing to say about sessions
    model = plane.models.find(body.model_id)
    if model is None:
        known = body.model_id == DEFAULT
        message = "nothing to kill" if known else f"there is no session {body.model_id}"
        return schema.KillSessionResponse(success=known, message=message)
    if body.reset_weights and model.lora is None:
        raise InvalidRequest("reset_weights: full weights cannot be reset; load_weights restores a checkpoint")
    model.forget()
    stays = body.model_id == DEFAULT and not body.reset_weights
    ref = CheckpointRef(body.model_id, "weights", new_name("kill"))
    try:
        if body.save_checkpoint:
            directory = str(plane.checkpoints.directory(ref))
            await plane.models.send(model, SaveWeights(model_id=body.model_id, directory=directory, name=ref.name))
        if not stays and plane.models.find(body.model_id) is model:  # nobody else has ended it meanwhile
            await plane.models.unload(model)
    except (QueueFull, EngineLost):
        raise
    except XorlError as error:
        return schema.KillSessionResponse(success=False, message=str(error))
    message = f"session {body.model_id} is kept" if stays else f"session {body.model_id} has ended"
    path = ref.native_uri if body.save_checkpoint else None
    return schema.KillSessionResponse(success=True, message=message, checkpoint_path=path)


@router.get("/session_info")
async def session_info(plane: Plane) -> schema.SessionInfo:
    live, idle_s = plane.models.live(), plane.config.http.session_idle_s
    return schema.SessionInfo(
        registered_models=plane.models.ids(),
        active_sessions=sum(time.time() - model.last_activity < idle_s for model in live),
        session_activity={model.model_id: model.last_activity for model in live},
        idle_timeout_seconds=idle_s,
        loaded_sampling_adapters=plane.sampling.num_adapters(),
        loaded_training_adapters=[model.model_id for model in live if model.lora],
        max_training_adapters=plane.config.engine.max_resident_adapters,
        current_training_adapter=plane.models.current,
    )


@router.post("/create_session")
async def create_session(plane: Plane, body: schema.CreateSessionRequest | None = None) -> schema.CreateSessionResponse:
    """A name that models and samplers are grouped under; with a base_model, also a model of that name."""
    body = body or schema.CreateSessionRequest()
    session_id = body.session_id or f"s{uuid.uuid4().hex[:16]}"
    if body.base_model is not None:
        ensure_model(
            plane, session_id, schema.CreateModelRequest(base_model=body.base_model, lora_config=body.lora_config)
        )
    elif body.lora_config is not None:
        raise InvalidRequest("base_model: missing, without which lora_config makes no model")
    plane.store.put_session(session_id)
    return schema.CreateSessionResponse(session_id=session_id)


@router.post("/session_heartbeat")
async def session_heartbeat(body: schema.HeartbeatRequest, plane: Plane) -> schema.HeartbeatResponse:
    if not plane.store.heartbeat(body.session_id) and body.session_id not in plane.models.ids():
        raise UnknownId(f"session_id {body.session_id} not found")
    return schema.HeartbeatResponse(session_id=body.session_id)
