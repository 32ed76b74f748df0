"""Serves the training calls: forward, forward_backward, optim_step, and the results of all calls."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import Match, Route
from starlette.types import Scope

from xorl.engine.commands import AnyResult, Forward, ForwardBackward, ForwardResult, OptimStep, OptimStepResult
from xorl.errors import InvalidRequest
from xorl.server import datums, schema, tinker_proto
from xorl.server.answers import Answer, ForwardAnswer, JsonAnswer
from xorl.server.datums import Columns
from xorl.server.futures import Failure, Pending
from xorl.server.losses import parse_loss
from xorl.server.models import Model
from xorl.server.plane import ControlPlane, of, then
from xorl.server.requests import DirectRoute, StrictRequest
from xorl.types import AdamParams, AnyLoss

PROTOBUF = "application/x-protobuf"

router = APIRouter(prefix="/api/v1", tags=["training"], route_class=DirectRoute)


@router.post("/forward_backward")
async def forward_backward(body: schema.ForwardBackwardRequest, request: StrictRequest) -> schema.FutureRef:
    """Add the gradient of a batch of datums; the next optim_step divides by their number of valid tokens."""
    start = partial(_start_json, of(request), body.forward_backward_input, backward=True)
    return await _submit(body, request, start)


@router.post("/forward")
async def forward(body: schema.ForwardRequest, request: StrictRequest) -> schema.FutureRef:
    """Log-probabilities and the loss, without a gradient."""
    start = partial(_start_json, of(request), body.forward_input, backward=False)
    return await _submit(body, request, start)


async def _submit(
    body: schema.SequencedRequest, request: StrictRequest, start: Callable[[Model], Coroutine[Any, Any, Answer]]
) -> schema.FutureRef:
    content = (await request.read()).digest
    return of(request).submit(body.model_id, body.seq_id, content, start)


async def forward_backward_protobuf(request: Request) -> JSONResponse:
    """tinker's form of both calls, told apart by forward_only; its gradient is the plain sum."""
    plane = of(request)
    content, digest = await StrictRequest(request.scope, request.receive).read()
    if request.headers.get("content-encoding", "identity") == "zstd":
        plain = tinker_proto.decompress(content, plane.config.http.max_body_mb * 2**20)
    else:
        plain = content
    message = tinker_proto.decode_forward_backward(plain)

    def start(model: Model) -> Coroutine[Any, Any, Answer]:
        loss = parse_loss(message.loss_fn, message.options)
        examples = tinker_proto.examples(message.data, datums.wanted(loss))
        columns = datums.columns(examples, loss, plane.models.info)
        return _send(plane, model, columns, loss, backward=not message.forward_only, token_mean=False)

    ref = plane.submit(message.model_id, message.seq_id or None, digest, start)
    return JSONResponse(ref.model_dump())


class _ProtobufRoute(Route):
    """Matches by content type too, so that JSON and protobuf can share a path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        if match == Match.NONE or not Headers(scope=scope).get("content-type", "").startswith(PROTOBUF):
            return Match.NONE, {}
        return match, {**child_scope, "route": self}


protobuf_route = _ProtobufRoute("/api/v1/forward_backward", forward_backward_protobuf, methods=["POST"])


def _start_json(
    plane: ControlPlane, given: schema.Input, model: Model, *, backward: bool
) -> Coroutine[Any, Any, Answer]:
    for name in ("routed_experts", "routed_expert_logits"):
        if getattr(given, name):
            raise InvalidRequest(f"{name}: the base model has no experts to route to")
    loss = parse_loss(given.loss_fn, given.loss_fn_params or {})
    columns = datums.columns(datums.from_json(given.data, loss), loss, plane.models.info)
    return _send(plane, model, columns, loss, backward=backward, token_mean=True)


def _send(
    plane: ControlPlane, model: Model, columns: Columns, loss: AnyLoss, *, backward: bool, token_mean: bool
) -> Coroutine[Any, Any, Answer]:
    data, widths = columns
    if backward:
        command = ForwardBackward(model_id=model.model_id, datums=data, loss=loss, token_mean=token_mean)
    else:
        command = Forward(model_id=model.model_id, datums=data, loss=loss)

    def form(result: AnyResult) -> Answer:
        assert isinstance(result, ForwardResult)
        return ForwardAnswer(result, loss, data, widths)

    future = plane.models.send(model, command)
    plane.metrics.tokens.labels("forward_backward" if backward else "forward").inc(len(data.tokens) // 4)
    return then(future, form)


@router.post("/optim_step")
async def optim_step(body: schema.OptimStepRequest, request: StrictRequest) -> schema.FutureRef:
    """One AdamW step with the gradient accumulated since the last one."""
    plane = of(request)

    def start(model: Model) -> Coroutine[Any, Any, Answer]:
        command = OptimStep(model_id=model.model_id, adam=_adam_params(body, model.adam))
        return then(plane.models.send(model, command), _optim_answer)

    return await _submit(body, request, start)


def _adam_params(body: schema.OptimStepRequest, session: AdamParams) -> AdamParams:
    """What the call gives goes before the session's defaults, at its top level first."""
    given = body.adam_params or schema.AdamParamsWire()
    if given.type is not None and given.type.lower() not in ("adam", "adamw"):
        raise InvalidRequest(f"optimizer_params.type: {given.type!r} is not supported, only adamw")
    values = given.model_dump(exclude={"type"}, exclude_none=True)
    if body.learning_rate is not None:
        values["learning_rate"] = body.learning_rate
    if body.gradient_clip is not None:
        values["grad_clip_norm"] = body.gradient_clip
    return msgspec.structs.replace(session, **values)


def _optim_answer(result: AnyResult) -> Answer:
    assert isinstance(result, OptimStepResult)
    metrics = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate, "step": result.step}
    return JsonAnswer({"metrics": metrics, "info": {}})


@router.post("/retrieve_future")
async def retrieve_future(body: schema.RetrieveFutureRequest, request: StrictRequest) -> Response:
    """Wait for a result: the result itself, `try_again` when it takes long, or `error` and `category`."""
    plane = of(request)
    match await plane.futures.retrieve(body.request_id):
        case Pending():
            deep = plane.engine.num_queued > plane.config.http.max_queued // 2
            return JSONResponse(
                {
                    "type": "try_again",
                    "request_id": body.request_id,
                    "queue_state": "paused_capacity" if deep else "active",
                    "queue_state_reason": None,
                }
            )
        case Failure(error, category):
            return JSONResponse({"error": error, "category": category})
        case answer:
            if PROTOBUF in request.headers.get("accept", "") and answer.protobuf is not None:
                return Response(answer.protobuf, media_type=PROTOBUF)
            return Response(answer.json, media_type="application/json")
