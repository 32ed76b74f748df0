"""Inference endpoints, weight sync, sampling sessions."""

import asyncio

import pytest

from inprocess import Server
from xorl.engine.commands import Endpoint, SyncWeights
from xorl.quantization import Fp8

pytestmark = pytest.mark.anyio

ADD = {
    "host": "127.0.0.1",
    "port": 30000,
    "world_size": 1,
    "sync_weights": False,
    "master_address": "",
    "master_port": 29600,
    "group_name": "weight_sync_group",
    "buffer_size_mb": 1024,
}


async def add(server: Server, port: int = 30000, **more: object) -> dict:
    return await server.post("/add_inference_endpoint", {**ADD, "port": port, **more})


async def sampler(server: Server, name: str, model_id: str = "default") -> str:
    return (await server.do("save_weights_for_sampler", {"model_id": model_id, "name": name}))["path"]


async def open_session(server: Server, path: str) -> dict:
    return await server.post("/api/v1/create_sampling_session", {"model_path": path})


async def test_add_list_remove(server: Server):
    added = await add(server)
    assert added["success"]
    assert added["endpoint"]["worker_port"] == 30000
    assert added["endpoint"]["server_info"]["model_path"] == "tiny/base"
    assert not added["weights_synced"]
    assert not (await add(server))["success"]  # registered already
    listed = await server.get("/list_inference_endpoints")
    assert listed["count"] == 1
    assert listed["endpoints"] == [added["endpoint"]]
    address = {"host": "127.0.0.1", "port": 30000}
    assert (await server.post("/remove_inference_endpoint", address))["success"]
    assert not (await server.post("/remove_inference_endpoint", address))["success"]
    assert (await server.get("/list_inference_endpoints")) == {"endpoints": [], "count": 0}


async def test_what_is_down_or_not_allowed_is_not_added(server: Server):
    assert "does not answer" in (await add(server, port=5))["message"]
    refused = await add(server, host="10.0.0.1")
    assert not refused["success"]
    assert "inference_hosts" in refused["message"]


async def test_a_worker_port_of_its_own_is_refused_by_name(server: Server):
    answer = await server.post("/add_inference_endpoint", {"host": "127.0.0.1", "port": 30000, "worker_port": 30001})
    assert answer["success"] is False
    assert answer["message"].startswith("worker_port: 30001")


async def test_any_host_can_be_allowed(serve):
    async with serve(inference_hosts="*") as server:
        assert (await add(server, host="10.0.0.1"))["success"]


async def test_health_is_asked_when_listed(server: Server):
    await add(server)
    server.receivers.down.add(30000)
    (row,) = (await server.get("/list_inference_endpoints"))["endpoints"]
    assert not row["healthy"]


async def test_a_sync_that_names_no_model_means_the_only_one_and_never_guesses(server: Server):
    await add(server)
    await server.create("a")
    await server.post("/sync_inference_weights", {})
    await server.post("/sync_inference_weights", {"model_id": None})
    assert [command.model_id for command in server.engine.sent(SyncWeights)] == ["a", "a"]
    await server.create("b")
    answer = await server.post("/sync_inference_weights", {}, status=400)
    assert answer["detail"] == "model_id: missing, and several models are live: a, b"


@pytest.mark.parametrize("path", ["/sync_inference_weights", "/api/v1/sync_inference_weights"])
async def test_sync(server: Server, path: str):
    nobody = await server.post(path, {"master_address": "127.0.0.1"})
    assert nobody["success"] is False
    await add(server)
    await add(server, port=30001, pool="eval", world_size=2)
    body = {"master_address": "127.0.0.1", "master_port": 29600, "group_name": "g", "buffer_size_mb": 2}
    report = await server.post(path, {**body, "sync_method": "nccl_ep_scatter"})
    assert report["success"]
    assert report["message"] == "synced 2 of 2"
    assert (report["total_bytes"], report["num_parameters"], report["num_buckets"]) == (1000, 10, 1)
    assert [line["port"] for line in report["endpoints_synced"]] == [30000, 30001]
    (command,) = server.engine.sent(SyncWeights)
    assert command.endpoints == [Endpoint("127.0.0.1", 30000, 1), Endpoint("127.0.0.1", 30001, 2)]
    assert command.bucket_bytes == 2 * 2**20
    assert (command.cache_mode, command.pause_mode, command.quantization) == ("auto", "retract", None)
    await server.post(path, {**body, "pools": ["eval"], "weight_version": "v2"})
    assert server.engine.sent(SyncWeights)[1].endpoints == [Endpoint("127.0.0.1", 30001, 2)]


async def test_an_endpoint_that_missed_a_sync_is_stale_until_it_has_one(server: Server):
    await add(server)
    await add(server, port=30001)
    server.engine.failing_endpoints = {30001}
    report = await server.post("/sync_inference_weights", {})
    assert not report["success"]
    assert report["message"].startswith("synced 1 of 2; 127.0.0.1:30001")

    async def stale() -> list[bool]:
        return [row["stale"] for row in (await server.get("/list_inference_endpoints"))["endpoints"]]

    assert await stale() == [False, True]
    server.engine.failing_endpoints = set()
    await server.post("/sync_inference_weights", {})
    assert await stale() == [False, False]


async def test_add_can_sync_at_once(server: Server):
    added = await add(server, sync_weights=True)
    assert added["weights_synced"]
    assert added["sync_message"] == "synced 1 of 1"


async def test_a_sync_that_the_engine_refuses_is_an_answer(server: Server):
    await add(server)
    await server.post("/sleep", {})
    report = await server.post("/sync_inference_weights", {})
    assert not report["success"]
    assert "wake_up" in report["message"]


async def test_a_sync_that_the_engine_does_not_survive_leaves_its_endpoints_stale(server: Server):
    await add(server)
    await add(server, port=30001, pool="eval")
    server.engine.gate.clear()
    sync = asyncio.create_task(server.post("/sync_inference_weights", {"pools": ["eval"]}))
    while not server.engine.sent(SyncWeights):
        await asyncio.sleep(0)
    server.engine.lose("the engine process ended with exit code -9")
    report = await sync
    assert not report["success"]
    assert "exit code -9" in report["message"]
    rows = (await server.get("/list_inference_endpoints"))["endpoints"]
    assert [row["stale"] for row in rows] == [False, True]


async def test_quantization(server: Server):
    await add(server)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    assert (await server.post("/api/v1/set_sync_quantization", {"quantization": fp8}))["quantization"] == fp8
    await server.post("/sync_inference_weights", {})
    assert server.engine.sent(SyncWeights)[0].quantization == Fp8(form="block")
    for wrong in ({"quant_method": "int4"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}, {}):
        assert (await server.refused("set_sync_quantization", {"quantization": wrong})).startswith("quantization")
    assert (await server.post("/api/v1/set_sync_quantization", {"quantization": None}))["quantization"] is None
    await server.post("/sync_inference_weights", {})
    assert server.engine.sent(SyncWeights)[1].quantization is None


async def test_sampling_session_registers_the_bare_name_everywhere(server: Server):
    path = await sampler(server, "samp-1")
    assert "add_inference_endpoint" in (await server.refused("create_sampling_session", {"model_path": path}))
    await add(server)
    await add(server, port=30001)
    opened = await open_session(server, path)
    assert opened == {"success": True, "model_path": path, "lora_name": "samp-1", "message": "loaded"}
    directory = str(server.output_dir.resolve() / "default/sampler_weights/samp-1")
    assert server.receivers.adapters == {30000: {"samp-1": directory}, 30001: {"samp-1": directory}}
    info = await server.get("/api/v1/session_info")
    assert info["loaded_sampling_adapters"] == {"default": 1}


async def test_sampling_sessions_of_what_is_not_there(server: Server):
    await add(server)
    await server.refused("create_sampling_session", {"model_path": "xorl://default/sampler_weights/nope"}, 404)
    await server.do("save_weights", {"path": "a"})
    assert "sampler" in await server.refused("create_sampling_session", {"model_path": "xorl://default/weights/a"})
    assert "model_path" in await server.refused("create_sampling_session", {})


async def test_the_least_recently_used_adapter_leaves(server: Server):
    await add(server)
    paths = {name: await sampler(server, name) for name in "abc"}
    for name in "abac":  # two fit
        await open_session(server, paths[name])
    assert set(server.receivers.adapters[30000]) == {"a", "c"}


async def test_a_sampler_saved_anew_is_loaded_anew(server: Server):
    await add(server)
    for _ in range(2):
        await open_session(server, await sampler(server, "s"))
    assert [what for _, what, _ in server.receivers.log] == ["load", "load"]


async def test_one_endpoint_that_fails_does_not_stop_the_others(server: Server):
    await add(server)
    await add(server, port=30009)
    path = await sampler(server, "s")
    assert (await open_session(server, path))["success"]
    await server.post("/remove_inference_endpoint", {"host": "127.0.0.1", "port": 30000})
    assert "refused" in await server.refused("create_sampling_session", {"model_path": path})


async def test_full_weights_are_loaded_from_disk(serve):
    async with serve(full=True) as server:
        await add(server)
        await open_session(server, await sampler(server, "s"))
        assert server.receivers.from_disk[30000].endswith("default/sampler_weights/s")
