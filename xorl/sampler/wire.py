"""Carries requests from HTTP to the engine, and answers back."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from fastapi import Depends, Request, Response

from xorl.errors import InvalidRequest
from xorl.sampler.engine import Engine
from xorl.sampler.info import ModelFacts
from xorl.sampler.intake import Limits
from xorl.sampler.weights import WeightReceiver

T = TypeVar("T")


class Sampler(NamedTuple):
    """All that the routes act on. The receiver belongs to the engine's thread."""

    engine: Engine
    receiver: WeightReceiver
    limits: Limits
    facts: ModelFacts

    def close(self) -> None:
        self.engine.stop()
        self.receiver.close()


class Failure(msgspec.Struct):
    message: str
    success: bool = False


class LoraFailure(Failure):
    error_message: str = ""


class ErrorText(msgspec.Struct):
    message: str


class GenerateFailure(msgspec.Struct):
    error: ErrorText


class Success(msgspec.Struct):
    message: str = "Success"
    success: bool = True


async def of_request(request: Request) -> Sampler:
    return request.app.state.sampler


Served = Annotated[Sampler, Depends(of_request)]


async def body(request: Request, kind: type[T]) -> T:
    """The request's JSON as a `kind`; an empty body has every default."""
    try:
        return msgspec.json.decode(await request.body() or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise InvalidRequest(str(error)) from None


def encoded(answer: msgspec.Struct | list[msgspec.Struct], status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, media_type="application/json")


async def result(future: "Future[T]") -> T:
    return await asyncio.wrap_future(future)


def error_answer(path: str, message: str) -> msgspec.Struct:
    """An error in the form that SGLang gives it on this route."""
    if path == "/generate":
        return GenerateFailure(ErrorText(message))
    if path.endswith("lora_adapter"):
        return LoraFailure(message, error_message=message)
    return Failure(message)
