"""Pausing, resuming, aborting and flushing keep SGLang's promises."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sampler.serving import Client, drive, generate, logprobs, ok

PROMPT = [5, 6, 7]
LONG = {"max_new_tokens": 300, "ignore_eos": True, "seed": 5}


async def started(client: Client, **fields: Any) -> "asyncio.Task[Any]":
    """A long request that is surely running: the one that came in after it has been answered."""
    task = asyncio.create_task(generate(client, PROMPT, LONG, return_logprob=True, **fields))
    await asyncio.sleep(0)
    await generate(client, [9], {"max_new_tokens": 3})
    assert not task.done()
    return task


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_rows_go_on_where_they_were(tiny_model: Path, mode: str) -> None:
    async def scenario(client: Client) -> None:
        expected = await generate(client, PROMPT, LONG, return_logprob=True)
        running = await started(client)
        await ok(client, "/pause_generation", {"mode": mode})
        arrived = asyncio.create_task(generate(client, [8], {"max_new_tokens": 2}))
        flushed = await client.post("/flush_cache")
        assert flushed.status_code == (200 if mode == "retract" else 400)
        assert flushed.headers["content-type"].startswith("text/plain")
        assert (await client.get("/health")).status_code == 200
        await ok(client, "/update_weight_version", {"new_version": "v1", "abort_all_requests": False})
        assert not running.done()
        assert not arrived.done()
        await ok(client, "/continue_generation")
        answer = await running
        await arrived
        assert answer["output_ids"] == expected["output_ids"]
        assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-4)
        spans = answer["meta_info"]["weight_versions"]
        assert [span["version"] for span in spans] == ["default", "v1"]
        assert [spans[0]["start"], spans[1]["end"]] == [0, 300]
        assert spans[0]["end"] == spans[1]["start"]
        assert answer["meta_info"]["weight_version"] == "v1"

    drive(tiny_model, scenario)


def test_pause_aborts_by_default_and_holds_what_comes(tiny_model: Path) -> None:
    async def scenario(client: Client) -> None:
        running = await started(client)
        await ok(client, "/pause_generation")
        answer = await running
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert 0 < len(answer["output_ids"]) < 300
        held = asyncio.create_task(generate(client, PROMPT, {"max_new_tokens": 2}))
        assert (await client.get("/flush_cache")).status_code == 200
        assert not held.done()
        await ok(client, "/continue_generation")
        assert (await held)["meta_info"]["finish_reason"]["type"] in ("length", "stop")

    drive(tiny_model, scenario)


def test_abort_ends_the_named_request_alone(tiny_model: Path) -> None:
    async def scenario(client: Client) -> None:
        first = await started(client, rid="one")
        second = await started(client, rid="two")
        await client.post("/abort_request", json={"rid": ""})
        await client.post("/abort_request", json={"rid": "one"})
        meta = (await first)["meta_info"]
        assert meta["id"] == "one"
        assert meta["finish_reason"] == {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        assert (await second)["meta_info"]["finish_reason"] == {"type": "length", "length": 300}
        third = await started(client)
        await client.post("/abort_request", json={"abort_all": True})
        assert (await third)["meta_info"]["finish_reason"]["type"] == "abort"

    drive(tiny_model, scenario)


def test_health_and_facts(tiny_model: Path) -> None:
    async def scenario(client: Client) -> None:
        assert (await client.get("/health_generate")).status_code == 200
        info = (await client.get("/model_info")).json()
        assert info["model_path"] == str(tiny_model)
        assert info["weight_version"] == "default"
        assert (await client.get("/get_model_info")).json() == info
        server = (await client.get("/server_info")).json()
        assert server == (await client.get("/get_server_info")).json()
        assert (server["tp_size"], server["quantization"], server["dtype"]) == (1, None, "float32")
        assert server["enable_lora"] is True

    drive(tiny_model, scenario)
