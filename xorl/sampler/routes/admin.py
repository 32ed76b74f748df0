"""Reports and steers: health, model facts, pause and resume, aborts, adapters."""

import asyncio
from pathlib import Path

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from xorl.sampler import schema
from xorl.sampler.adapters import load_adapter
from xorl.sampler.rows import Prompt, Row, StopRule
from xorl.sampler.sampling import Sampling
from xorl.sampler.wire import Served, body, encoded, result

router = APIRouter()
_HEALTH_TIMEOUT_S = 20.0


class StatusAnswer(msgspec.Struct):
    message: str
    status: str = "ok"


class LoraAnswer(msgspec.Struct):
    loaded_adapters: dict[str, str]
    success: bool = True
    error_message: str = ""


@router.get("/health")
async def health(sampler: Served) -> Response:
    return Response(status_code=200 if sampler.engine.alive else 503)


@router.get("/health_generate")
async def health_generate(sampler: Served) -> Response:
    """Generate one token; 503 while that cannot be done, as when generation is paused."""
    row = Row(Prompt("HEALTH_CHECK", (0,), Sampling(0.0), StopRule(1), None, 0, 0, None, 0))
    sampler.engine.submit([row])
    try:
        await asyncio.wait_for(result(row.future), _HEALTH_TIMEOUT_S)
    except TimeoutError:
        sampler.engine.call(lambda: sampler.engine.abort_rows([row]))
        return Response(status_code=503)
    return Response()


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(sampler: Served) -> Response:
    return encoded(sampler.facts.model_info(sampler.engine.weight_version))


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(sampler: Served) -> Response:
    return encoded(sampler.facts.server_info(sampler.engine.weight_version))


@router.get("/v1/models")
async def models(sampler: Served) -> Response:
    return encoded(sampler.facts.models((name, one.path) for name, one in sampler.engine.adapters.items()))


@router.api_route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(sampler: Served) -> PlainTextResponse:
    if await result(sampler.engine.call(sampler.engine.flush)):
        return PlainTextResponse("Cache flushed.\n")
    return PlainTextResponse("Cache not flushed: requests are running or queued.\n", 400)


@router.post("/abort_request")
async def abort(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.AbortRequest)
    if asked.abort_all or asked.rid:
        await result(sampler.engine.call(lambda: sampler.engine.abort("" if asked.abort_all else asked.rid)))
    return Response()


@router.post("/pause_generation")
async def pause(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.PauseRequest)
    await result(sampler.engine.call(lambda: sampler.engine.pause(asked.mode)))
    return encoded(StatusAnswer(f"Generation paused ({asked.mode})."))


@router.post("/continue_generation")
async def resume(sampler: Served) -> Response:
    await result(sampler.engine.call(sampler.engine.resume))
    return encoded(StatusAnswer("Generation continued."))


@router.post("/load_lora_adapter")
async def load_lora(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.LoadLoraRequest)
    engine = sampler.engine
    engine.refuse_loaded(asked.lora_name)
    network = engine.network
    adapter = await asyncio.to_thread(
        load_adapter, asked.lora_name, Path(asked.lora_path), network.model, network.device
    )
    await result(engine.call(lambda: engine.add_adapter(adapter)))
    return encoded(LoraAnswer({name: one.path for name, one in engine.adapters.items()}))


@router.post("/unload_lora_adapter")
async def unload_lora(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.UnloadLoraRequest)
    engine = sampler.engine
    await result(engine.call(lambda: engine.remove_adapter(asked.lora_name)))
    return encoded(LoraAnswer({name: one.path for name, one in engine.adapters.items()}))
