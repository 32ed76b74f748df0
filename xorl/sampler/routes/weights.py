"""Takes new weights: the update group, the update session, updates from it and from disk."""

from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response

from xorl.errors import InvalidRequest
from xorl.sampler import schema
from xorl.sampler.wire import Sampler, Served, Success, body, encoded, result

router = APIRouter()


class DiskAnswer(Success):
    num_paused_requests: int = 0


class VersionAnswer(Success):
    new_version: str = ""


class RankChecksums(msgspec.Struct):
    checksums: dict[str, str]
    per_gpu_checksum: str
    parallelism_info: dict[str, int]


class CheckerAnswer(Success):
    ranks: tuple[RankChecksums, ...] = ()
    per_engine_checksum: str = ""


@router.post("/init_weights_update_group")
async def init_group(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.InitGroupRequest)
    await result(
        sampler.engine.call(
            lambda: sampler.receiver.join(
                asked.master_address,
                asked.master_port,
                asked.rank_offset,
                asked.world_size,
                asked.group_name,
                asked.backend,
            )
        )
    )
    return encoded(Success(f"joined {asked.group_name} as rank {asked.rank_offset}"))


@router.post("/destroy_weights_update_group")
async def destroy_group(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.DestroyGroupRequest)
    await result(sampler.engine.call(lambda: sampler.receiver.leave(asked.group_name)))
    return encoded(Success())


@router.post("/begin_weight_update")
async def begin(sampler: Served) -> Response:
    await result(sampler.engine.call_alone(sampler.receiver.begin))
    return encoded(Success())


@router.post("/end_weight_update")
async def end(sampler: Served) -> Response:
    await result(sampler.engine.call_alone(sampler.receiver.end))
    return encoded(Success())


@router.post("/update_weights_from_distributed")
async def update_from_distributed(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.UpdateRequest)
    specs, flattened = asked.specs(), asked.load_format == "flattened_bucket"
    await result(sampler.engine.call(lambda: sampler.receiver.check(specs, asked.group_name, flattened=flattened)))

    def update() -> None:
        sampler.receiver.receive(specs, asked.group_name, flattened=flattened)
        _commit(sampler, asked.weight_version, flush=asked.flush_cache)

    await result(sampler.engine.call_alone(update, abort=asked.abort_all_requests))
    return encoded(Success())


@router.post("/update_weights_from_disk")
async def update_from_disk(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.UpdateFromDiskRequest)

    def update() -> None:
        sampler.receiver.load_folder(Path(asked.model_path))
        _commit(sampler, asked.weight_version, flush=asked.flush_cache)

    await result(sampler.engine.call_alone(update, abort=asked.abort_all_requests))
    return encoded(DiskAnswer())


@router.post("/update_weight_version")
async def update_version(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.VersionRequest)
    engine = sampler.engine
    await result(engine.call(lambda: engine.set_weight_version(asked.new_version, abort=asked.abort_all_requests)))
    return encoded(VersionAnswer(new_version=asked.new_version))


@router.post("/weights_checker")
async def check(request: Request, sampler: Served) -> Response:
    await body(request, schema.CheckerRequest)
    checksums, digest = await result(sampler.engine.call(sampler.receiver.checksums))
    rank = RankChecksums(checksums, digest, {"tp_rank": 0, "tp_size": 1})
    return encoded(CheckerAnswer(ranks=(rank,), per_engine_checksum=digest))


def _commit(sampler: Sampler, version: str | None, *, flush: bool) -> None:
    """The new weights are in: name them, then check that nothing of the old ones is in use, as SGLang does."""
    if version is not None:
        sampler.engine.set_weight_version(version, abort=False)
    if flush and not sampler.engine.flush():
        raise InvalidRequest("the weights are updated, but the cache was not flushed: requests are running or queued")
