"""Creating, unloading and killing models; repeats of requests."""

import asyncio
from pathlib import Path

import pytest

from inprocess import Server
from xorl.engine.commands import CreateModel, OptimStep, SaveWeights, UnloadModel
from xorl.server.store import Run, Store
from xorl.types import LORA_PROJECTIONS, LoraSpec

pytestmark = pytest.mark.anyio

TINKER = {"session_id": "s1", "model_seq_id": 0, "base_model": "tiny/base", "type": "create_model"}


async def test_create_as_xorl_client_does(server: Server):
    body = {"model_id": "run1", "base_model": "tiny/base", "lora_config": {"rank": 8, "dropout": 0.0, "alpha": 16}}
    assert await server.do("create_model", body) == {"model_id": "run1", "type": "create_model"}
    assert server.engine.sent(CreateModel) == [CreateModel(model_id="run1", lora=LoraSpec(8, 16.0))]


async def test_create_as_tinker_does(server: Server):
    lora = {"rank": 4, "seed": 7, "train_unembed": True, "train_mlp": False, "train_attn": True}
    result = await server.do("create_model", {**TINKER, "lora_config": lora, "optimizer_config": {"type": "adamw"}})
    assert result["model_id"] == "s1:train:0"
    (command,) = server.engine.sent(CreateModel)
    assert command.lora == LoraSpec(4, 32.0, ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head"), 7)
    info = await server.post("/api/v1/get_info", {"model_id": "s1:train:0", "type": "get_info"})
    assert info["model_data"] == {"arch": "tiny", "model_name": "tiny/base", "tokenizer_id": None}
    assert (info["is_lora"], info["lora_rank"]) == (True, 4)


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        ({}, LORA_PROJECTIONS),
        ({"target_modules": "all-linear"}, LORA_PROJECTIONS),
        ({"target_modules": ["v_proj", "q_proj"]}, ("q_proj", "v_proj")),
        ({"target_modules": ["lm_head"]}, ("lm_head",)),
        ({"rank": None, "lora_alpha": 8}, LORA_PROJECTIONS),
    ],
)
async def test_targets(server: Server, config: dict, targets: tuple[str, ...]):
    await server.do("create_model", {"model_id": "m", "base_model": "base", "lora_config": config})
    assert server.engine.models["m"].lora.target_modules == targets


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"base_model": "other/model"}, "base_model: this server has tiny/base"),
        ({"model_id": "a/b"}, "model_id:"),
        ({"model_id": ".."}, "model_id:"),
        ({"model_id": ""}, "model_id:"),
        ({"model_id": "x" * 200}, "model_id:"),
        ({"lora_config": {"rank": 0}}, "lora_config.rank: 0 is not in 1..256"),
        ({"lora_config": {"rank": 257}}, "lora_config.rank: 257"),
        ({"lora_config": {"dropout": 0.1}}, "lora_config.dropout:"),
        ({"lora_config": {"alpha": 0}}, "lora_config.alpha:"),
        ({"lora_config": {"target_modules": ["embed_tokens"]}}, "lora_config.target_modules: 'embed_tokens'"),
        (
            {"lora_config": {"train_mlp": False, "train_attn": False, "train_unembed": False}},
            "lora_config: at least one",
        ),
        ({"optimizer_config": {"type": "muon"}}, "optimizer_config.type: 'muon'"),
        ({"optimizer_config": {"optimizer_dtype": "bf16"}}, "optimizer_config.optimizer_dtype: 'bf16'"),
    ],
)
async def test_what_cannot_be_had_is_named(server: Server, body: dict, place: str):
    assert (await server.refused("create_model", {"base_model": "tiny/base", **body})).startswith(place)
    assert not server.engine.commands


async def test_an_existing_model_is_kept_if_it_is_what_was_asked_for(server: Server):
    await server.create("m", alpha=16)
    await server.do("optim_step", {"model_id": "m"})
    for lora_config in ({"rank": 8}, {"rank": None}, {}, {"rank": 8, "alpha": 16, "dropout": 0.0}):
        body = {"model_id": "m", "base_model": "tiny/base", "lora_config": lora_config}
        assert (await server.do("create_model", body))["model_id"] == "m"
    assert len(server.engine.sent(CreateModel)) == 1
    body = {"model_id": "m", "base_model": "tiny/base", "lora_config": {"rank": 32}}
    assert await server.refused("create_model", body) == "lora_config.rank: the model exists with 8, not 32"


async def test_a_creation_that_fails_leaves_no_model(server: Server):
    result = await server.create("m", seed=666)
    assert result == {"error": "lora_config.seed: an unlucky number", "category": "user"}
    assert "m is not registered" in await server.refused("optim_step", {"model_id": "m"})
    assert await server.create("m") == {"model_id": "m", "type": "create_model"}


async def test_default_is_created_by_its_first_command(server: Server):
    assert (await server.get("/api/v1/session_info"))["registered_models"] == ["default"]
    await server.do("optim_step", {})
    await server.do("optim_step", {})
    kinds = [type(command) for command in server.engine.commands]
    assert kinds == [CreateModel, OptimStep, OptimStep]


async def test_default_can_be_given_a_spec_before_it_is_used(server: Server):
    assert "error" not in await server.create("default")
    assert server.engine.models["default"].lora.rank == 8


async def test_an_unknown_model_is_named_with_those_there_are(server: Server):
    detail = await server.refused("optim_step", {"model_id": "nope"})
    assert detail == "model_id: nope is not registered; there are default"


async def test_full_weights_are_one_model(serve):
    async with serve(full=True) as server:
        body = {"base_model": "tiny/base", "lora_config": {"rank": 32}}
        assert (await server.do("create_model", {**body, "model_id": "default"}))["model_id"] == "default"
        assert server.engine.models["default"].lora is None
        assert "full weights" in await server.refused("create_model", {**body, "model_id": "other"})
        assert "full weights" in await server.refused("create_model", {**body, **TINKER})
        await server.do("save_weights", {"path": "a"})
        info = await server.post("/api/v1/weights_info", {"xorl_path": "xorl://default/weights/a"})
        assert info == {"base_model": "tiny/base", "is_lora": False}
        assert (await server.refused("kill_session", {"reset_weights": True})).startswith("reset_weights:")


async def test_unload_comes_after_what_was_asked_before(server: Server):
    await server.create("m")
    server.engine.gate.clear()
    step = await server.post("/api/v1/optim_step", {"model_id": "m"})
    unload = await server.post("/api/v1/unload_model", {"model_id": "m", "type": "unload_model"})
    assert "m is not registered" in await server.refused("optim_step", {"model_id": "m"})
    server.engine.gate.set()
    assert "metrics" in await server.retrieve(step["request_id"])
    assert await server.retrieve(unload["request_id"]) == {"model_id": "m", "type": "unload_model"}
    await server.refused("unload_model", {"model_id": "m"})


async def test_kill_saves_and_ends(server: Server):
    await server.create("m")
    killed = await server.post("/api/v1/kill_session", {"model_id": "m"})
    assert killed["success"]
    assert killed["checkpoint_path"].startswith("xorl://m/weights/kill-")
    assert [type(c) for c in server.engine.commands] == [CreateModel, SaveWeights, UnloadModel]
    listed = await server.post("/api/v1/list_checkpoints", {"model_id": "m"})
    assert [row["path"] for row in listed["checkpoints"]] == [killed["checkpoint_path"]]
    again = await server.post("/api/v1/kill_session", {"model_id": "m"})
    assert not again["success"]
    await server.create("m")
    assert "error" not in await server.do("load_weights", {"model_id": "m", "path": killed["checkpoint_path"]})


async def test_what_cannot_be_saved_is_not_killed(server: Server):
    await server.create("m")
    await server.post("/sleep", {})
    killed = await server.post("/api/v1/kill_session", {"model_id": "m"})
    assert not killed["success"]
    assert "asleep" in killed["message"]
    await server.post("/wake_up", {})
    assert (await server.do("optim_step", {"model_id": "m"}))["metrics"]["step"] == 1


async def test_two_kills_at_once_end_it_once(server: Server):
    await server.create("m")
    server.engine.gate.clear()
    kills = [asyncio.create_task(server.post("/api/v1/kill_session", {"model_id": "m"})) for _ in range(2)]
    while len(server.engine.sent(SaveWeights)) < 2:
        await asyncio.sleep(0)
    server.engine.gate.set()
    killed = await asyncio.gather(*kills)
    assert [one["success"] for one in killed] == [True, True]
    assert len(server.engine.sent(UnloadModel)) == 1


async def test_an_unload_during_sleep_frees_the_id(server: Server):
    await server.create("m")
    await server.do("optim_step", {"model_id": "m"})
    await server.post("/sleep", {})
    assert "error" not in await server.do("unload_model", {"model_id": "m"})
    assert (await server.get("/api/v1/session_info"))["current_training_adapter"] is None
    await server.post("/wake_up", {})
    await server.create("m")
    assert (await server.do("optim_step", {"model_id": "m"}))["metrics"]["step"] == 1


async def test_kill_keeps_default(server: Server):
    assert (await server.post("/api/v1/kill_session", {"model_id": "default"}))["success"]
    await server.do("optim_step", {})
    kept = await server.post("/api/v1/kill_session", {"model_id": "default", "save_checkpoint": False})
    assert kept["success"]
    assert kept["checkpoint_path"] is None
    assert (await server.do("optim_step", {}))["metrics"]["step"] == 2
    await server.post("/api/v1/kill_session", {"save_checkpoint": False, "reset_weights": True})
    assert (await server.do("optim_step", {}))["metrics"]["step"] == 1


async def test_session_info(server: Server):
    await server.create("m")
    await server.do("optim_step", {"model_id": "m"})
    info = await server.get("/api/v1/session_info")
    assert info["registered_models"] == ["default", "m"]
    assert info["loaded_training_adapters"] == ["m"]
    assert info["current_training_adapter"] == "m"
    assert info["active_sessions"] == 1
    assert list(info["session_activity"]) == ["m"]
    assert info["idle_timeout_seconds"] == 7200.0
    assert info["max_training_adapters"] == 64
    assert info["loaded_sampling_adapters"] == {}


async def test_sessions(server: Server):
    session = await server.post("/api/v1/create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})
    assert session["type"] == "create_session"
    beat = await server.post("/api/v1/session_heartbeat", {"session_id": session["session_id"]})
    assert beat == {"type": "session_heartbeat", "session_id": session["session_id"]}
    await server.refused("session_heartbeat", {"session_id": "nope"}, 404)
    assert (await server.http.post("/api/v1/create_session")).status_code == 200
    assert (await server.refused("create_session", {"lora_config": {"rank": 8}})).startswith("base_model: missing")
    await server.post("/api/v1/create_session", {"session_id": "m", "base_model": "tiny/base"})
    assert "metrics" in await server.do("optim_step", {"model_id": "m"})


async def test_a_repeat_of_a_tinker_request_runs_once_for_ever(server: Server):
    await server.do("create_model", TINKER)
    body = {"model_id": "s1:train:0", "seq_id": 1, "adam_params": {"learning_rate": 0.1}}
    first = await server.post("/api/v1/optim_step", body)
    await server.post("/api/v1/optim_step", {**body, "seq_id": 2})
    assert await server.post("/api/v1/optim_step", body) == first
    assert len(server.engine.sent(OptimStep)) == 2
    detail = await server.refused("optim_step", {**body, "adam_params": {"learning_rate": 0.2}})
    assert detail.startswith("seq_id: 1 of s1:train:0")
    await server.do("create_model", TINKER)
    assert await server.post("/api/v1/optim_step", body) == first


async def test_a_repeat_of_a_refused_request_is_new(server: Server):
    await server.do("create_model", TINKER)
    server.engine.gate.clear()
    server.engine.max_queued = 0
    body = {"model_id": "s1:train:0", "seq_id": 1}
    await server.refused("optim_step", body, 429)
    server.engine.max_queued = 9
    server.engine.gate.set()
    assert "metrics" in await server.do("optim_step", body)


async def test_a_repeat_of_an_xorl_request_is_one_only_right_after_it(server: Server):
    body = {"seq_id": 1, "learning_rate": 0.1}
    first = await server.post("/api/v1/optim_step", body)
    assert await server.post("/api/v1/optim_step", body) == first
    await server.post("/api/v1/optim_step", {"seq_id": 2})
    again = await server.post("/api/v1/optim_step", body)
    assert again != first
    other = await server.post("/api/v1/optim_step", {**body, "learning_rate": 0.2})
    assert other != again


async def test_a_new_client_starts_counting_anew(server: Server):
    for forget in (
        lambda: server.create("default", rank=32),
        lambda: server.post("/api/v1/kill_session", {"save_checkpoint": False}),
        lambda: server.do("unload_model", {}),
    ):
        first = await server.post("/api/v1/optim_step", {"seq_id": 1})
        await forget()
        assert await server.post("/api/v1/optim_step", {"seq_id": 1}) != first


async def test_requests_without_seq_id_are_all_new(server: Server):
    refs = [await server.post("/api/v1/optim_step", {}) for _ in range(3)]
    assert len({ref["request_id"] for ref in refs}) == 3


async def test_two_creations_at_once_are_one(server: Server):
    server.engine.gate.clear()
    body = {"model_id": "m", "base_model": "tiny/base"}
    refs = [await server.post("/api/v1/create_model", body) for _ in range(2)]
    server.engine.gate.set()
    results = await asyncio.gather(*(server.retrieve(ref["request_id"]) for ref in refs))
    assert results == [{"model_id": "m", "type": "create_model"}] * 2
    assert len(server.engine.sent(CreateModel)) == 1


def test_the_time_of_a_request_is_known_at_once_and_kept_over_a_restart(tmp_path: Path):
    store = Store(tmp_path / "xorl.db")
    for model_id in ("a", "b"):
        store.put_run(Run(model_id, None, "base", 8, 0.0, None))
    for model_id in ("b", "a"):  # the second within the time that is not written at once
        store.touch_run(model_id)
        assert [run.model_id for run in store.runs(limit=9, offset=0)] == ([model_id, *{"a", "b"} - {model_id}])
    store.touch_run("b")
    store.close()
    again = Store(tmp_path / "xorl.db")
    assert [run.model_id for run in again.runs(limit=9, offset=0)] == ["b", "a"]
    again.close()
