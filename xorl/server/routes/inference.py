"""Serves the inference endpoints: registering, weight sync, sampling sessions."""

import uuid

from fastapi import APIRouter

from xorl.engine.commands import SyncReport, SyncWeights
from xorl.errors import InvalidRequest, UnknownId, XorlError
from xorl.quantization import Fp8, read_fp8
from xorl.server import schema_inference as wire
from xorl.server.checkpoints import parse
from xorl.server.endpoints import sync_target
from xorl.server.lora import check_base_model
from xorl.server.models import DEFAULT
from xorl.server.plane import ControlPlane, Plane
from xorl.server.requests import StrictRoute
from xorl.server.store import Sampler

router = APIRouter(tags=["inference"], route_class=StrictRoute)


@router.post("/add_inference_endpoint")
async def add_inference_endpoint(body: wire.AddEndpointRequest, plane: Plane) -> wire.AddEndpointResponse:
    """Register an inference server that answers; with sync_weights, also give it the weights of `default`."""
    added = await plane.endpoints.add(body)
    if isinstance(added, str):
        return wire.AddEndpointResponse(success=False, message=added)
    if not body.sync_weights:
        return wire.AddEndpointResponse(success=True, message="added", endpoint=added.row())
    transport = body.model_dump(include=set(wire.SyncTransport.model_fields))
    synced = await _sync(plane, wire.SyncRequest(model_id=DEFAULT, **transport))
    return wire.AddEndpointResponse(
        success=True, message="added", endpoint=added.row(), weights_synced=synced.success, sync_message=synced.message
    )


@router.post("/remove_inference_endpoint")
async def remove_inference_endpoint(body: wire.EndpointAddress, plane: Plane) -> wire.RemoveEndpointResponse:
    removed = plane.endpoints.remove(body.host, body.port)
    message = "removed" if removed else f"{body.host}:{body.port} is not registered"
    return wire.RemoveEndpointResponse(success=removed, message=message)


@router.get("/list_inference_endpoints")
async def list_inference_endpoints(plane: Plane) -> wire.EndpointRows:
    """All endpoints, asked for their health now. `stale`: the last weight sync did not reach it whole."""
    await plane.endpoints.probe()
    rows = [endpoint.row() for endpoint in plane.endpoints]
    return wire.EndpointRows(endpoints=rows, count=len(rows))


@router.post("/api/v1/sync_inference_weights")
@router.post("/sync_inference_weights")
async def sync_inference_weights(body: wire.SyncRequest, plane: Plane) -> wire.SyncResponse:
    """Stream a model's merged weights to the endpoints; answers when they have them."""
    return await _sync(plane, body)


async def _sync(plane: ControlPlane, body: wire.SyncRequest) -> wire.SyncResponse:
    model = plane.models.unnamed() if body.model_id is None else plane.models[body.model_id]
    targets = plane.endpoints.in_pools(body.pools)
    if not targets:
        where = "" if body.pools is None else f" in pools {', '.join(body.pools)}"
        return wire.SyncResponse(success=False, message=f"there is no inference endpoint{where}")
    command = SyncWeights(
        model_id=model.model_id,
        endpoints=[sync_target(endpoint) for endpoint in targets],
        master_address=body.master_address,
        master_port=body.master_port,
        group_name=body.group_name,
        bucket_bytes=body.buffer_size_mb * 2**20,
        flush_cache=body.flush_cache,
        cache_mode=body.cache_invalidation_mode,
        pause_mode=body.pause_mode,
        weight_version=body.weight_version,
        quantization=_fp8(body.quantization) or plane.endpoints.quantization,
    )
    try:
        report = await plane.models.send(model, command)
    except XorlError as error:
        if error.category == "server":  # so it may have failed midway
            plane.endpoints.distrust(targets)
        return wire.SyncResponse(success=False, message=str(error))
    assert isinstance(report, SyncReport)
    plane.endpoints.mark(report)
    return _sync_response(report)


def _sync_response(report: SyncReport) -> wire.SyncResponse:
    lines = [
        wire.EndpointSynced(host=line.host, port=line.port, success=line.success, message=line.message)
        for line in report.endpoints
    ]
    num_synced = sum(line.success for line in lines)
    failures = "".join(f"; {line.host}:{line.port}: {line.message}" for line in lines if not line.success)
    return wire.SyncResponse(
        success=num_synced == len(lines),
        message=f"synced {num_synced} of {len(lines)}{failures}",
        transfer_time=report.transfer_time,
        total_bytes=report.total_bytes,
        num_parameters=report.num_parameters,
        num_buckets=report.num_buckets,
        endpoints_synced=lines,
    )


@router.post("/api/v1/set_sync_quantization")
async def set_sync_quantization(body: wire.QuantizationRequest, plane: Plane) -> wire.QuantizationResponse:
    """Set what later syncs send where they do not say; null leaves it to each endpoint's model config."""
    plane.endpoints.quantization = fp8 = _fp8(body.quantization)
    message = "weights are sent as each endpoint serves them"
    if fp8 is not None:
        message = f"linear layers are sent as FP8 with a scale a {fp8.form}; who serves others refuses them"
    return wire.QuantizationResponse(quantization=body.quantization, message=message)


def _fp8(quantization: wire.Quantization | None) -> Fp8 | None:
    """In 128 × 128 blocks unless it says otherwise."""
    return None if quantization is None else read_fp8({"strategy": "block"} | quantization)


@router.post("/api/v1/create_sampling_session")
async def create_sampling_session(body: wire.SamplingSessionRequest, plane: Plane) -> dict[str, str | bool]:
    """Load sampler weights on the endpoints; answers xorl-client with their name there, tinker with an id."""
    if body.sampling_session_seq_id is not None:
        return await _create_sampler(plane, body, body.sampling_session_seq_id)
    if body.model_path is None:
        raise InvalidRequest("model_path: missing")
    ref = parse(body.model_path, body.model_id or DEFAULT, "model_path")
    weights = plane.sampling.weights(ref)
    await plane.sampling.load(ref.model_id, weights)
    return {"success": True, "model_path": body.model_path, "lora_name": weights.name or "", "message": "loaded"}


async def _create_sampler(plane: ControlPlane, body: wire.SamplingSessionRequest, number: int) -> dict[str, str | bool]:
    session_id = body.session_id or f"s{uuid.uuid4().hex[:16]}"
    base_model = plane.models.info.names[0]
    if body.model_path is not None:
        ref = parse(body.model_path, DEFAULT, "model_path")
        await plane.sampling.load(ref.model_id, plane.sampling.weights(ref))
    elif body.base_model is not None:
        check_base_model(body.base_model, plane.models.info)
    else:
        raise InvalidRequest("model_path: missing, and base_model too")
    sampler = Sampler(f"{session_id}:sample:{number}", session_id, base_model, body.model_path)
    plane.store.put_sampler(sampler)
    return {"type": "create_sampling_session", "sampling_session_id": sampler.sampler_id}


def known_sampler(plane: ControlPlane, sampler_id: str) -> Sampler:
    sampler = plane.store.sampler(sampler_id)
    if sampler is None:
        raise UnknownId(f"sampling session {sampler_id} not found")
    return sampler
