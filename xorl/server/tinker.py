"""Serves the routes that the tinker SDK has beyond the API."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from xorl.errors import InvalidRequest, UnknownId
from xorl.server import schema
from xorl.server.checkpoints import parse
from xorl.server.lora import check_base_model
from xorl.server.models import DEFAULT
from xorl.server.plane import ControlPlane, Digest, Plane
from xorl.server.requests import StrictRoute
from xorl.server.routes.inference import known_sampler
from xorl.server.sampling import Weights
from xorl.server.schema_inference import SampleRef, SampleRequest

router = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=StrictRoute)

Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]


@router.post("/client/config")
async def client_config() -> dict[str, bool]:
    """Without parallel chunks the SDK sends everything in order."""
    return {"parallel_fwdbwd_chunks": False}


@router.post("/client/dynamic_config")
async def dynamic_config() -> dict[str, bool]:
    return {}


@router.post("/telemetry")
async def telemetry() -> dict[str, str]:
    """Accepted and not looked at."""
    return {"status": "accepted"}


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str) -> None:
    """A session's models stay until they are unloaded: another client may go on with them."""


class InfoRequest(schema.Wire):
    model_id: schema.ModelId


@router.post("/get_info")
async def get_info(body: InfoRequest, plane: Plane) -> dict[str, Any]:
    model, info = plane.models[body.model_id], plane.models.info
    return {
        "type": "get_info",
        "model_id": body.model_id,
        "model_data": {"arch": info.arch, "model_name": info.names[0], "tokenizer_id": None},
        "is_lora": model.lora is not None,
        "lora_rank": model.lora.rank if model.lora else None,
        "model_name": info.names[0],
    }


@router.get("/get_server_capabilities")
async def get_server_capabilities(plane: Plane) -> dict[str, list[dict[str, Any]]]:
    info = plane.models.info
    sampleable = len(plane.endpoints) > 0
    able = {"max_context_length": info.max_context_length, "trainable": True, "sampleable": sampleable}
    return {"supported_models": [{"model_name": name} | able for name in info.names]}


@router.get("/sessions")
async def sessions(plane: Plane, limit: Limit = 20, offset: Offset = 0) -> dict[str, list[str]]:
    return {"sessions": plane.store.sessions(limit, offset)}


@router.get("/sessions/{session_id}")
async def session(session_id: str, plane: Plane) -> dict[str, list[str]]:
    if not plane.store.has_session(session_id):
        raise UnknownId(f"session_id {session_id} not found")
    runs, samplers = plane.store.run_ids(session_id), plane.store.sampler_ids(session_id)
    return {"training_run_ids": runs, "sampler_ids": samplers}


@router.get("/samplers/{sampler_id}")
async def sampler(sampler_id: str, plane: Plane) -> dict[str, str | None]:
    found = known_sampler(plane, sampler_id)
    return {"sampler_id": sampler_id, "base_model": found.base_model, "model_path": found.model_path}


@router.post("/asample")
async def asample(body: SampleRequest, plane: Plane, content: Digest) -> SampleRef:
    """Sample from the inference endpoints, in turn; sample i of a request with a seed has seed + i."""
    prompt = plane.sampling.check(body, plane.models.info)
    model_id, weights = _sampled_weights(plane, body)
    request_id = plane.sampling.repeats.earlier(body.sampling_session_id, body.seq_id, content)
    if request_id is None or plane.futures.failed(request_id):
        seed = body.sampling_params.seed
        request_id = plane.futures.add(plane.sampling.sample(prompt, body.num_samples, seed, model_id, weights))
        plane.sampling.repeats.accept(body.sampling_session_id, body.seq_id, content, request_id)
    ids = [f"{request_id}-{i}" for i in range(body.num_samples)]
    return SampleRef(request_id=request_id, sample_sequence_ids=ids)


def _sampled_weights(plane: ControlPlane, body: SampleRequest) -> tuple[str, Weights | None]:
    """Whose weights to sample with; None for what the endpoints serve by themselves."""
    path, base_model = body.model_path, body.base_model
    if body.sampling_session_id is not None:
        path = known_sampler(plane, body.sampling_session_id).model_path
    elif path is None and base_model is None:
        raise InvalidRequest("sampling_session_id: missing, and model_path and base_model too")
    if path is None:
        if base_model is not None:
            check_base_model(base_model, plane.models.info)
        return DEFAULT, None
    ref = parse(path, DEFAULT, "model_path")
    return ref.model_id, plane.sampling.weights(ref)
