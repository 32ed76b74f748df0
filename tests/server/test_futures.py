"""Results, and how often, how long and by whom they can be had."""

import asyncio

import pytest

from inprocess import Server
from xorl.errors import InvalidRequest, UnknownId
from xorl.server.answers import JsonAnswer
from xorl.server.futures import DELIVERED_TTL_S, Failure, Futures, Pending

pytestmark = pytest.mark.anyio


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def answer() -> JsonAnswer:
    return JsonAnswer({"a": 1})


async def fail(error: Exception) -> JsonAnswer:
    raise error


async def test_every_retrieve_of_an_id_gets_the_same_answer():
    futures = Futures(hold_s=5, ttl_s=100)
    request_id = futures.add(answer())
    first, second = await asyncio.gather(futures.retrieve(request_id), futures.retrieve(request_id))
    assert first is second is await futures.retrieve(request_id)


async def test_a_result_that_is_not_there_is_waited_for_no_longer_than_the_hold():
    futures = Futures(hold_s=0.01, ttl_s=100)
    release = asyncio.Event()

    async def late() -> JsonAnswer:
        await release.wait()
        return await answer()

    request_id = futures.add(late())
    assert await futures.retrieve(request_id) == Pending()
    assert futures.num_active == 1
    release.set()
    assert isinstance(await futures.retrieve(request_id), JsonAnswer)
    assert (futures.num_active, futures.num_total) == (0, 1)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (InvalidRequest("data[0]: bad"), Failure("data[0]: bad", "user")),
        (ZeroDivisionError("oops"), Failure("internal error: ZeroDivisionError: oops", "server")),
    ],
)
async def test_a_failure_is_a_result_too(error: Exception, failure: Failure):
    futures = Futures(hold_s=5, ttl_s=100)
    request_id = futures.add(fail(error))
    assert await futures.retrieve(request_id) == failure == await futures.retrieve(request_id)


@pytest.mark.parametrize("delivered", [False, True])
async def test_results_expire(delivered: bool):
    clock = Clock()
    futures = Futures(hold_s=5, ttl_s=3600, clock=clock)
    request_id = futures.add(answer())
    await asyncio.sleep(0)
    if delivered:
        await futures.retrieve(request_id)
    clock.now = DELIVERED_TTL_S - 1
    assert delivered is False or isinstance(await futures.retrieve(request_id), JsonAnswer)
    clock.now = DELIVERED_TTL_S + 1 if delivered else 3601
    result = await futures.retrieve(request_id)
    assert isinstance(result, Failure)
    assert result.category == "server"
    assert "expired" in result.error


async def test_expired_results_free_their_memory_unasked():
    clock = Clock()
    futures = Futures(hold_s=5, ttl_s=100, clock=clock)
    old = futures.add(answer())
    await asyncio.sleep(0)
    clock.now = 200
    futures.add(answer())
    assert old not in futures._entries


async def test_what_is_not_finished_does_not_expire():
    clock = Clock()
    futures = Futures(hold_s=0.001, ttl_s=1, clock=clock)
    release = asyncio.Event()
    request_id = futures.add(release.wait())  # type: ignore[arg-type]
    clock.now = 100
    assert await futures.retrieve(request_id) == Pending()
    release.set()


async def test_who_waits_when_the_server_stops_is_answered():
    futures = Futures(hold_s=5, ttl_s=100)
    finished, running = futures.add(answer()), futures.add(asyncio.sleep(100, await answer()))
    assert isinstance(await futures.retrieve(finished), JsonAnswer)
    waiting = asyncio.create_task(futures.retrieve(running))
    await asyncio.sleep(0)
    futures.stop()
    assert await waiting == Failure("the server is stopping", "server")
    assert isinstance(await futures.retrieve(finished), JsonAnswer)


async def test_an_unknown_id_is_unknown():
    with pytest.raises(UnknownId, match="future_nope not found"):
        await Futures(hold_s=1, ttl_s=1).retrieve("future_nope")


async def test_pending_on_the_wire(serve):
    async with serve(retrieve_hold_s=0.01) as server:
        server.engine.gate.clear()
        ref = await server.post("/api/v1/optim_step", {})
        assert ref["model_id"] == "default"
        assert ref["request_id"].startswith("future_")
        assert len(ref["request_id"]) == len("future_") + 12
        assert await server.retrieve(ref["request_id"]) == {
            "type": "try_again",
            "request_id": ref["request_id"],
            "queue_state": "active",
            "queue_state_reason": None,
        }
        server.engine.gate.set()
        while (result := await server.retrieve(ref["request_id"])).get("type") == "try_again":
            pass
        assert result["metrics"]["step"] == 1


async def test_unknown_id_on_the_wire(server: Server):
    assert "not found" in await server.refused("retrieve_future", {"request_id": "future_000000000000"}, 404)


async def test_an_engine_that_ends_fails_what_it_had(serve):
    async with serve() as server:
        server.engine.gate.clear()
        ref = await server.post("/api/v1/optim_step", {})
        await asyncio.sleep(0)
        server.engine.lose("the engine process ended with exit code 9")
        result = await server.retrieve(ref["request_id"])
        assert result == {"error": "the engine process ended with exit code 9", "category": "server"}
        await server.post("/api/v1/optim_step", {}, 503)
        assert (await server.get("/health", 503))["status"] == "unhealthy"


async def test_a_full_queue_refuses_before_it_accepts(server: Server):
    server.engine.gate.clear()
    server.engine.max_queued = 2
    ref = await server.post("/api/v1/optim_step", {"seq_id": 1})
    assert "waiting" in await server.refused("optim_step", {"seq_id": 2}, 429)
    server.engine.gate.set()
    await server.retrieve(ref["request_id"])
    assert "metrics" in await server.do("optim_step", {"seq_id": 2})


async def test_many_pipelined_requests_run_in_order(server: Server):
    refs = [await server.post("/api/v1/optim_step", {"seq_id": i}) for i in range(1, 201)]
    results = await asyncio.gather(*(server.retrieve(ref["request_id"]) for ref in refs))
    assert [result["metrics"]["step"] for result in results] == list(range(1, 201))
