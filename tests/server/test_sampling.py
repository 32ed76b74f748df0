"""asample over a real connection to a stand-in for SGLang."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from tinker.proto.response_conv import deserialize_sample_response

from fakes import FakeEngine, FakeReceivers
from inprocess import Server, settings
from xorl.server.app import create_app
from xorl.sync.receiver import Receiver

pytestmark = pytest.mark.anyio


class FakeSglang:
    """Continues a prompt by counting up; forgets nothing that it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.adapters: dict[str, str] = {}
        self.aborting = False
        self.broken = False
        self.app = FastAPI()
        self.app.add_api_route("/health", lambda: None)
        self.app.add_api_route("/server_info", lambda: {"model_path": "tiny/base", "tp_size": 1})
        self.app.add_api_route("/generate", self.generate, methods=["POST"])
        self.app.add_api_route("/load_lora_adapter", self.load, methods=["POST"])
        self.app.add_api_route("/unload_lora_adapter", self.unload, methods=["POST"])

    async def load(self, request: Request) -> dict:
        body = await request.json()
        self.adapters[body["lora_name"]] = body["lora_path"]
        return {"success": True}

    async def unload(self, request: Request) -> dict:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            raise HTTPException(400, "not loaded")
        return {"success": True}

    async def generate(self, request: Request) -> object:
        body = await request.json()
        self.asked.append(body)
        if self.broken:
            raise HTTPException(500, "out of order")
        if body.get("lora_path") not in (None, *self.adapters):
            raise HTTPException(400, "lora not loaded")
        params = body["sampling_params"]
        one = self.one(body["input_ids"], params["max_new_tokens"], body.get("logprob_start_len", -1))
        return [one] * params["n"] if params.get("n", 1) > 1 else one

    def one(self, prompt: list[int], max_new_tokens: int, start: int) -> dict:
        new = [(prompt[-1] + i + 1) % 100 for i in range(max_new_tokens)]
        finish = {"type": "length", "length": len(new)}
        if self.aborting:
            finish = {"type": "abort", "message": "paused", "status_code": None, "err_type": None}
        scored = [] if start < 0 else [[None if i == 0 else -1.0, t, None] for i, t in enumerate(prompt)][start:]
        return {
            "text": "",
            "output_ids": new,
            "meta_info": {
                "id": "x",
                "finish_reason": finish,
                "output_token_logprobs": [[-0.5, token, None] for token in new],
                "input_token_logprobs": scored,
            },
        }


@contextlib.asynccontextmanager
async def listening(sglang: FakeSglang) -> AsyncIterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # who connects before it serves waits, and isn't refused
        http = uvicorn.Server(uvicorn.Config(sglang.app, log_level="critical", lifespan="off"))
        task = asyncio.create_task(http.serve([listener]))
        yield listener.getsockname()[1]
        http.should_exit = True
        await task


@pytest.fixture
async def sampled(tmp_path: Path, anyio_backend: str) -> AsyncIterator[tuple[Server, FakeSglang]]:
    """A server with one endpoint and a trained model s1:train:0."""
    sglang, engine = FakeSglang(), FakeEngine()
    app = create_app(settings(tmp_path), engine, Receiver)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://xorl")
    async with listening(sglang) as port, app.router.lifespan_context(app), http:
        server = Server(app, engine, FakeReceivers(), http, tmp_path)
        added = await server.post("/add_inference_endpoint", {"host": "127.0.0.1", "port": port})
        assert added["success"], added
        await server.do("create_model", {"session_id": "s1", "model_seq_id": 0, "base_model": "tiny/base"})
        yield server, sglang


def asked(session: str, tokens: list[int] = [5, 9, 2], seq_id: int = 0, **more: object) -> dict:  # noqa: B006
    params = {"max_tokens": 4, "temperature": 0.7, "top_k": -1, "top_p": 1.0} | dict(more.pop("params", {}))
    return {
        "num_samples": 1,
        "prompt": {"chunks": [{"tokens": tokens, "type": "encoded_text"}]},
        "sampling_params": params,
        "sampling_session_id": session,
        "seq_id": seq_id,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "type": "sample",
        **more,
    }


async def session_of(server: Server, **body: object) -> str:
    opened = await server.post(
        "/api/v1/create_sampling_session", {"session_id": "s1", "sampling_session_seq_id": 0, **body}
    )
    assert opened["type"] == "create_sampling_session"
    return opened["sampling_session_id"]


async def sample(server: Server, body: dict):
    ref = await server.post("/api/v1/asample", body)
    assert len(ref["sample_sequence_ids"]) == body["num_samples"]
    headers = {"accept": "application/x-protobuf"}
    response = await server.http.post(
        "/api/v1/retrieve_future", json={"request_id": ref["request_id"]}, headers=headers
    )
    assert response.headers["content-type"] == "application/x-protobuf", response.text
    return deserialize_sample_response(response.content)


async def test_sampling_the_base_model(sampled):
    server, sglang = sampled
    result = await sample(server, asked(await session_of(server, base_model="tiny/base"), params={"stop": [7]}))
    (sequence,) = result.sequences
    assert sequence.tokens == [3, 4, 5, 6]
    assert sequence.logprobs == [-0.5] * 4
    assert sequence.stop_reason == "length"
    (request,) = sglang.asked
    assert "lora_path" not in request
    assert request["sampling_params"]["stop_token_ids"] == [7]
    assert request["sampling_params"]["max_new_tokens"] == 4


async def test_prompt_logprobs_begin_with_nan(sampled):
    server, _ = sampled
    session = await session_of(server, base_model="tiny/base")
    result = await sample(server, asked(session, prompt_logprobs=True, params={"max_tokens": 1}))
    assert np.isnan(result.prompt_logprobs_np[0])
    assert result.prompt_logprobs_np[1:].tolist() == [-1.0, -1.0]
    result = await sample(server, asked(session, seq_id=1, prompt_logprobs=True, prompt_logprobs_last_n=1))
    assert np.isnan(result.prompt_logprobs_np).tolist() == [True, True, False]


async def test_a_sampler_checkpoint_is_sampled_under_a_name_of_its_own(sampled):
    server, sglang = sampled
    saved = await server.do("save_weights_for_sampler", {"model_id": "s1:train:0", "path": "a", "kind": "snapshot"})
    session = await session_of(server, model_path=saved["path"])
    assert await server.get(f"/api/v1/samplers/{session}") == {
        "sampler_id": session,
        "base_model": "tiny/base",
        "model_path": saved["path"],
    }
    await sample(server, asked(session))
    assert sglang.asked[0]["lora_path"] == "a@s1.train.0"
    assert sglang.adapters["a@s1.train.0"].endswith("s1%3Atrain%3A0/sampler_weights/a")


async def test_an_adapter_that_left_comes_back_when_it_is_sampled(sampled):
    server, sglang = sampled
    sessions = []
    for i, name in enumerate("abc"):  # two fit
        saved = await server.do("save_weights_for_sampler", {"model_id": "s1:train:0", "path": name, "seq_id": i})
        sessions.append(await session_of(server, model_path=saved["path"], sampling_session_seq_id=i))
    assert set(sglang.adapters) == {"b@s1.train.0", "c@s1.train.0"}
    await sample(server, asked(sessions[0]))
    assert set(sglang.adapters) == {"a@s1.train.0", "c@s1.train.0"}


async def test_save_and_sample_in_one_call(sampled):
    server, sglang = sampled
    body = {"model_id": "s1:train:0", "sampling_session_seq_id": 4, "kind": "inflight", "seq_id": 1}
    result = await server.do("save_weights_for_sampler", body)
    assert result["sampling_session_id"] == "s1:sample:4"
    assert "path" not in result
    await sample(server, asked(result["sampling_session_id"]))
    assert sglang.asked[0]["lora_path"] in sglang.adapters


async def test_samples_of_a_seed_have_seeds_of_their_own(sampled):
    server, sglang = sampled
    session = await session_of(server, base_model="tiny/base")
    result = await sample(server, asked(session, num_samples=3, params={"seed": 40}, prompt_logprobs=True))
    assert len(result.sequences) == 3
    assert sorted(request["sampling_params"]["sampling_seed"] for request in sglang.asked) == [40, 41, 42]
    assert sum("logprob_start_len" in request for request in sglang.asked) == 1
    result = await sample(server, asked(session, seq_id=1, num_samples=3))
    assert len(result.sequences) == 3
    assert sglang.asked[-1]["sampling_params"]["n"] == 3


@pytest.mark.parametrize(
    ("stop", "expected"),
    [([], {"ignore_eos": True}), ("x", {"stop": "x"}), (["x", "y"], {"stop": ["x", "y"]}), (None, {})],
)
async def test_stops(sampled, stop: object, expected: dict):
    server, sglang = sampled
    await sample(server, asked(await session_of(server, base_model="base"), params={"stop": stop, "max_tokens": None}))
    params = sglang.asked[0]["sampling_params"]
    assert {key: params[key] for key in ("stop", "stop_token_ids", "ignore_eos") if key in params} == expected
    assert params["max_new_tokens"] == 64 - 3 - 1  # fills the context


async def test_a_repeat_is_sampled_once(sampled):
    server, sglang = sampled
    body = asked(await session_of(server, base_model="base"))
    first = await server.post("/api/v1/asample", body)
    assert await server.post("/api/v1/asample", body) == first
    await server.retrieve(first["request_id"])
    assert len(sglang.asked) == 1


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"prompt": {"chunks": []}}, "prompt: needs"),
        ({"prompt": {"chunks": [{"tokens": [100]}]}}, "prompt: expected token ids"),
        ({"prompt": {"chunks": [{"tokens": [1] * 64}]}}, "prompt: 64 tokens fill"),
        ({"topk_sample_logprobs": 2}, "topk_sample_logprobs: not supported"),
        ({"sampling_session_id": None}, "sampling_session_id: missing"),
        ({"num_samples": 0}, "num_samples:"),
        ({"sampling_params": {"top_p": 2}}, "sampling_params.top_p:"),
        ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p:"),
    ],
)
async def test_what_is_wrong_is_named(sampled, change: dict, place: str):
    server, _ = sampled
    body = asked(await session_of(server, base_model="base")) | change
    assert (await server.refused("asample", body)).startswith(place)


async def test_failures_are_results(sampled):
    server, sglang = sampled
    session = await session_of(server, base_model="base")
    sglang.aborting = True
    failed = await server.do("asample", asked(session))
    assert failed["category"] == "server"
    assert "paused" in failed["error"]
    await server.post("/remove_inference_endpoint", {"host": "127.0.0.1", "port": await first_port(server)})
    failed = await server.do("asample", asked(session, seq_id=1))
    assert failed["category"] == "user"
    assert "no inference endpoint" in failed["error"]
    await server.refused("asample", asked("s1:sample:99"), 404)


async def test_an_endpoint_that_is_gone_is_passed_over(sampled):
    server, _ = sampled
    async with listening(FakeSglang()) as port:
        assert (await server.post("/add_inference_endpoint", {"host": "127.0.0.1", "port": port}))["success"]
    session = await session_of(server, base_model="base")
    for seq_id in range(4):
        result = await sample(server, asked(session, seq_id=seq_id))
        assert len(result.sequences) == 1


async def test_a_server_that_was_restarted_gets_its_adapter_again(sampled):
    server, sglang = sampled
    saved = await server.do("save_weights_for_sampler", {"model_id": "s1:train:0", "path": "a"})
    session = await session_of(server, model_path=saved["path"])
    sglang.adapters.clear()
    results = await asyncio.gather(*(sample(server, asked(session, seq_id=i)) for i in range(8)))
    assert all(len(result.sequences) == 1 for result in results)
    assert set(sglang.adapters) == {"a@s1.train.0"}


async def test_an_endpoint_out_of_order_is_passed_over_and_named_if_it_is_the_last(sampled):
    server, sglang = sampled
    session = await session_of(server, base_model="base")
    sglang.broken = True
    failed = await server.do("asample", asked(session))
    assert failed["category"] == "server"
    assert f"127.0.0.1:{await first_port(server)}: 500" in failed["error"]
    async with listening(FakeSglang()) as port:
        assert (await server.post("/add_inference_endpoint", {"host": "127.0.0.1", "port": port}))["success"]
        for seq_id in range(1, 4):
            assert len((await sample(server, asked(session, seq_id=seq_id))).sequences) == 1


async def first_port(server: Server) -> int:
    return (await server.get("/list_inference_endpoints"))["endpoints"][0]["port"]
