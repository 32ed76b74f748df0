"""Serves saving, loading, listing and deleting of checkpoints, and the list of training runs."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query

from xorl.engine.commands import LoadWeights, SaveSampler, SaveWeights
from xorl.errors import InvalidRequest, UnknownId, XorlError
from xorl.server import schema
from xorl.server.answers import Answer, JsonAnswer
from xorl.server.checkpoints import RESERVED, CheckpointRef, Kind, Scheme, iso_time, new_name, parse
from xorl.server.lora import adam_defaults, check_base_model
from xorl.server.models import DEFAULT, Model
from xorl.server.plane import ControlPlane, Digest, Plane, then
from xorl.server.requests import StrictRoute
from xorl.server.routes.models import check_full_weights_id, tinker_model_id
from xorl.server.store import Run, Sampler
from xorl.types import UNEMBEDDING, LoraSpec

SESSION_TTL_S = 24 * 3600
"""How long the weights of save_weights_and_get_sampling_client stay on disk: nobody knows their name."""

Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]

router = APIRouter(prefix="/api/v1", tags=["checkpoints"], route_class=StrictRoute)


@router.post("/save_weights")
async def save_weights(body: schema.SaveWeightsRequest, plane: Plane, content: Digest) -> schema.FutureRef:
    """Write weights and optimizer state. Without a path the server makes a name."""

    def start(model: Model) -> Coroutine[Any, Any, Answer]:
        ref = _new_ref(body.path, model.model_id, "weights", "path")
        command = SaveWeights(
            model_id=model.model_id,
            directory=str(plane.checkpoints.directory(ref)),
            name=ref.name,
            replace=body.overwrite,
            user_metadata=body.user_metadata,
        )
        return then(plane.models.send(model, command), _saved(plane, ref, body.ttl_seconds, "save_weights"))

    return plane.submit(body.model_id, body.seq_id, content, start)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(body: schema.SaveSamplerRequest, plane: Plane, content: Digest) -> schema.FutureRef:
    """Write what an inference server loads. One of the same name is replaced."""

    def start(model: Model) -> Coroutine[Any, Any, Answer]:
        ref = _new_ref(body.name, model.model_id, "sampler_weights", "name")
        directory = str(plane.checkpoints.directory(ref))
        command = SaveSampler(model_id=model.model_id, directory=directory, name=ref.name, replace=True)
        future = plane.models.send(model, command)
        if body.name is None and body.sampling_session_seq_id is not None:
            saved = then(future, _saved(plane, ref, SESSION_TTL_S, "save_weights_for_sampler"))
            return _open_session(plane, ref, body.sampling_session_seq_id, saved)
        return then(future, _saved(plane, ref, body.ttl_seconds, "save_weights_for_sampler"))

    return plane.submit(body.model_id, body.seq_id, content, start)


def _new_ref(path: str | None, model_id: str, kind: Kind, field: str) -> CheckpointRef:
    if path is None:
        return CheckpointRef(model_id, kind, new_name("checkpoint" if kind == "weights" else "sampler"))
    if "/" in path and "://" not in path:
        raise InvalidRequest(f"{field}: {path!r} is no checkpoint name: it has a slash")
    ref = parse(path, model_id, field)
    if "://" in path and (ref.model_id, ref.kind) != (model_id, kind):
        raise InvalidRequest(f"{field}: {path!r} is not of {model_id}/{kind}")
    if ref.name == RESERVED:
        raise InvalidRequest(f"{field}: the name {RESERVED} is reserved")
    return CheckpointRef(model_id, kind, ref.name)


def _saved(plane: ControlPlane, ref: CheckpointRef, ttl_seconds: int | None, call: str) -> Callable[[object], Answer]:
    def form(_: object) -> Answer:
        plane.checkpoints.saved(ref, ttl_seconds)
        return JsonAnswer({"path": ref.native_uri, "type": call})

    return form


async def _open_session(
    plane: ControlPlane, ref: CheckpointRef, number: int, saved: Coroutine[Any, Any, Answer]
) -> Answer:
    await saved
    await plane.sampling.load(ref.model_id, plane.sampling.weights(ref))
    session_id = ref.model_id.partition(":")[0]
    sampler = Sampler(f"{session_id}:sample:{number}", session_id, plane.models.info.names[0], ref.native_uri)
    plane.store.put_sampler(sampler)
    return JsonAnswer({"sampling_session_id": sampler.sampler_id, "type": "save_weights_for_sampler"})


@router.post("/load_weights")
async def load_weights(body: schema.LoadWeightsRequest, plane: Plane, content: Digest) -> schema.FutureRef:
    """Restore a model, or, in tinker's form with a session and no model, make one from a checkpoint."""
    model_id = body.model_id or body.session_id or DEFAULT
    creates = body.model_id is None and body.model_seq_id is not None
    if creates:
        model_id = tinker_model_id(body.session_id, body.model_seq_id or 0)
    ref = parse(body.path, model_id, "path")
    if ref.kind != "weights":
        raise InvalidRequest(f"path: {body.path!r} holds weights for inference, which cannot be trained on")
    scheme: Scheme = "tinker" if body.path.startswith("tinker://") else "xorl"
    answer = JsonAnswer({"path": ref.uri(scheme), "type": "load_weights"} | ({"model_id": model_id} if creates else {}))
    created = creates and plane.models.find(model_id) is None
    if created:
        _create_from(plane, model_id, ref, body)

    def start(model: Model) -> Coroutine[Any, Any, Answer]:
        directory = str(plane.checkpoints.directory(ref))
        command = LoadWeights(model_id=model.model_id, directory=directory, optimizer=body.optimizer)
        loading = then(plane.models.send(model, command), lambda _: answer)
        return _unloaded_if_failed(plane, model, loading) if created else loading

    seq_id = 0 if creates else body.seq_id  # the first request of a model that makes itself
    return plane.submit(model_id, seq_id, content, start)


def _create_from(plane: ControlPlane, model_id: str, ref: CheckpointRef, body: schema.LoadWeightsRequest) -> None:
    manifest = plane.checkpoints.manifest(ref)
    if body.base_model is not None:
        check_base_model(body.base_model, plane.models.info)
    if plane.models.info.full_weights:
        check_full_weights_id(model_id)
    if manifest.lora is None:
        raise InvalidRequest(f"path: {body.path!r} holds full weights, this server trains LoRA adapters")
    adam, _ = adam_defaults(body.optimizer_config)
    plane.models.create(model_id, manifest.lora, adam, body.user_metadata)


async def _unloaded_if_failed(plane: ControlPlane, model: Model, loading: Coroutine[Any, Any, Answer]) -> Answer:
    try:
        return await loading
    except XorlError:
        if plane.models.find(model.model_id) is model:
            plane.models.unload(model)
        raise


@router.post("/list_checkpoints")
async def list_checkpoints(body: schema.ModelRequest, plane: Plane) -> schema.CheckpointList:
    """Newest first; also of a model that has ended."""
    rows = plane.checkpoints.rows(body.model_id)
    if not rows and body.model_id not in plane.models.ids() and plane.store.run(body.model_id) is None:
        raise InvalidRequest(f"model_id: {body.model_id} is not registered; there are {', '.join(plane.models.ids())}")
    return schema.CheckpointList(checkpoints=rows)


@router.post("/delete_checkpoint")
async def delete_checkpoint(body: schema.DeleteCheckpointRequest, plane: Plane) -> schema.DeleteCheckpointResponse:
    ref = parse(body.checkpoint_id, body.model_id, "checkpoint_id")
    plane.checkpoints.delete(ref)
    return schema.DeleteCheckpointResponse(success=True, deleted_path=ref.native_uri)


@router.post("/weights_info")
async def weights_info(body: schema.WeightsInfoRequest, plane: Plane) -> dict[str, Any]:
    """What a checkpoint was trained from and how. lora_rank is absent, not null, for full weights."""
    if "://" not in body.path:
        raise InvalidRequest(f"path: {body.path!r} is not a xorl:// or tinker:// URI")
    manifest = plane.checkpoints.manifest(parse(body.path, DEFAULT, "path"))
    info = plane.engine.info
    base_model = info.names[0] if info and manifest.base_model in (info.path, *info.names) else manifest.base_model
    described: dict[str, Any] = {"base_model": base_model, "is_lora": manifest.lora is not None}
    return described | (_lora_info(manifest.lora) if manifest.lora else {})


def _lora_info(lora: LoraSpec) -> dict[str, Any]:
    return {
        "lora_rank": lora.rank,
        "lora_config": {"lora_rank": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.target_modules)},
        "train_attn": "q_proj" in lora.target_modules,
        "train_mlp": "gate_proj" in lora.target_modules,
        "train_unembed": UNEMBEDDING in lora.target_modules,
    }


@router.get("/training_runs")
async def training_runs(plane: Plane, limit: Limit = 20, offset: Offset = 0) -> schema.TrainingRuns:
    runs = [run_row(plane, run) for run in plane.store.runs(limit, offset)]
    cursor = schema.Cursor(offset=offset, limit=limit, total_count=len(plane.store.run_ids()))
    return schema.TrainingRuns(training_runs=runs, cursor=cursor)


@router.get("/training_runs/{model_id}")
async def training_run(model_id: schema.ModelId, plane: Plane) -> schema.TrainingRun:
    return run_row(plane, _known_run(plane, model_id))


@router.get("/training_runs/{model_id}/checkpoints")
async def training_run_checkpoints(model_id: schema.ModelId, plane: Plane) -> schema.CheckpointList:
    _known_run(plane, model_id)
    return schema.CheckpointList(checkpoints=plane.checkpoints.rows(model_id))


@router.delete("/training_runs/{model_id}/checkpoints/{kind}/{name}", status_code=204)
async def delete_run_checkpoint(model_id: schema.ModelId, kind: Kind, name: str, plane: Plane) -> None:
    plane.checkpoints.delete(parse(f"{kind}/{name}", model_id, "checkpoint_id"))


@router.get("/checkpoints")
async def all_checkpoints(plane: Plane, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
    """The checkpoints of all models."""
    rows = [row for model_id in plane.store.run_ids() for row in plane.checkpoints.rows(model_id)]
    rows.sort(key=lambda row: row.time, reverse=True)
    cursor = schema.Cursor(offset=offset, limit=limit, total_count=len(rows))
    return {"checkpoints": rows[offset : offset + limit], "cursor": cursor}


def _known_run(plane: ControlPlane, model_id: str) -> Run:
    run = plane.store.run(model_id)
    if run is None:
        raise UnknownId(f"training run {model_id} not found")
    return run


def run_row(plane: ControlPlane, run: Run) -> schema.TrainingRun:
    rows = plane.checkpoints.rows(run.model_id)
    return schema.TrainingRun(
        training_run_id=run.model_id,
        base_model=run.base_model,
        is_lora=run.lora_rank is not None,
        lora_rank=run.lora_rank,
        last_request_time=iso_time(run.last_request),
        last_checkpoint=next((row for row in rows if row.checkpoint_type == "training"), None),
        last_sampler_checkpoint=next((row for row in rows if row.checkpoint_type == "sampler"), None),
        user_metadata=run.user_metadata,
    )
