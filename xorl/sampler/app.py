"""Serves SGLang's HTTP protocol from an engine.

It differs from SGLang in this: /health does not generate, so it answers while generation is paused; an update whose
names or shapes do not fit is refused as a whole; an adapter unloads at once, and rows that use it end with it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request, Response

from xorl.engine.model import load_network, resolve_device, resolve_dtype
from xorl.errors import XorlError
from xorl.sampler.engine import Engine
from xorl.sampler.info import ModelFacts
from xorl.sampler.intake import Limits
from xorl.sampler.network import Network
from xorl.sampler.routes import admin, generate, weights
from xorl.sampler.text import Text, eos_token_ids
from xorl.sampler.weights import WeightReceiver
from xorl.sampler.wire import Sampler, encoded, error_answer


def serve(model: str, host: str = "127.0.0.1", port: int = 30000, device: str = "auto", dtype: str = "auto") -> None:
    """Serve `model` until SIGTERM or SIGINT."""
    sampler = load(model, device, dtype)
    config = uvicorn.Config(create_app(sampler), host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)
    uvicorn.Server(config).run()


def load(model: str, device: str = "auto", dtype: str = "auto") -> Sampler:
    """Load a model and its tokenizer, and start its engine."""
    place = resolve_device(device)
    network = Network(load_network(model, resolve_dtype(dtype, place), place))
    text = Text.of_model(model)
    return assemble(network, text, model)


def assemble(network: Network, text: Text, path: str) -> Sampler:
    config, generation = network.model.config, network.model.generation_config
    own_eos = generation.eos_token_id if generation is not None else None
    context_tokens = config.max_position_embeddings
    limits = Limits(
        network.vocab_size, context_tokens, eos_token_ids(own_eos, config.eos_token_id) | text.eos_token_ids
    )
    facts = ModelFacts(
        path=path,
        model_type=config.model_type,
        architectures=list(config.architectures or ()),
        context_tokens=context_tokens,
        dtype=str(network.dtype).removeprefix("torch."),
        device=str(network.device),
    )
    return Sampler(Engine(network, text), WeightReceiver(network), limits, facts)


def create_app(sampler: Sampler) -> FastAPI:
    """The HTTP face of a sampler; its engine stops with the app."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(sampler.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.sampler = sampler
    for router in (generate.router, weights.router, admin.router):
        app.include_router(router)

    @app.exception_handler(XorlError)
    async def answer_error(request: Request, error: XorlError) -> Response:
        return encoded(error_answer(request.url.path, str(error)), error.status)

    return app
