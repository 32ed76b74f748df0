"""Generates: /generate."""

import asyncio

import msgspec
from fastapi import APIRouter, Request, Response

from xorl.sampler import schema
from xorl.sampler.intake import lay_out
from xorl.sampler.rows import Row, output_text
from xorl.sampler.text import Text
from xorl.sampler.wire import Sampler, Served, body, encoded

router = APIRouter()
_DISCONNECT_POLL_S = 1.0


@router.api_route("/generate", methods=["POST", "PUT"])
async def generate(request: Request, sampler: Served) -> Response:
    asked = await body(request, schema.GenerateRequest)
    engine = sampler.engine
    intake = lay_out(asked, engine.text, sampler.limits, engine.adapters)
    engine.submit(intake.rows)
    await _finished(request, sampler, intake.rows)
    token_text = engine.text if asked.return_text_in_logprobs else None
    answers: list[msgspec.Struct] = [
        _answer(row, engine.text, keep_stop=wanted.keep_stop, logprobs=wanted.logprobs, token_text=token_text)
        for row, wanted in zip(intake.rows, intake.wanted, strict=True)
    ]
    return encoded(answers[0] if intake.single else answers)


async def _finished(request: Request, sampler: Sampler, rows: list[Row]) -> None:
    """Wait for all rows; when the client goes away, abort them.

    Raises:
        InternalError: the engine failed a row.
    """
    pending = asyncio.gather(*(asyncio.wrap_future(row.future) for row in rows))
    while not pending.done():
        await asyncio.wait([pending], timeout=_DISCONNECT_POLL_S)
        if not pending.done() and await request.is_disconnected():
            sampler.engine.call(lambda: sampler.engine.abort_rows(rows))
    await pending


def _answer(row: Row, text: Text, *, keep_stop: bool, logprobs: bool, token_text: Text | None) -> schema.GenerateAnswer:
    assert row.finish is not None
    meta = schema.MetaInfo(
        id=row.prompt.request_id,
        finish_reason=row.finish,
        prompt_tokens=len(row.prompt.tokens),
        completion_tokens=len(row.output),
        cached_tokens=row.cached_tokens,
        weight_version=row.weight_version,
        weight_versions=row.weight_spans,
        e2e_latency=row.latency_s,
    )
    if logprobs:
        schema.add_logprobs(meta, row, token_text)
    return schema.GenerateAnswer(output_text(row, text, keep_stop=keep_stop), row.output, meta)
