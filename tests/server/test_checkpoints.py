"""Saving, loading, listing, deleting; what survives a restart."""

import asyncio

import pytest

from inprocess import Server, running
from xorl.errors import InvalidRequest
from xorl.server.checkpoints import CheckpointRef, parse

pytestmark = pytest.mark.anyio


async def train(server: Server, model_id: str = "default") -> None:
    data = [{"model_input": {"input_ids": [1, 2]}, "loss_fn_inputs": {"target_tokens": [2, 3]}}]
    await server.do("forward_backward", {"model_id": model_id, "forward_backward_input": {"data": data}})
    await server.do("optim_step", {"model_id": model_id, "learning_rate": 0.5})


@pytest.mark.parametrize(
    ("path", "ref"),
    [
        ("xorl://M/weights/N", ("M", "weights", "N")),
        ("tinker://s:train:3/sampler_weights/N", ("s:train:3", "sampler_weights", "N")),
        ("weights/M/N", ("M", "weights", "N")),
        ("M/weights/N", ("M", "weights", "N")),
        ("weights/N", ("me", "weights", "N")),
        ("sampler_weights/N", ("me", "sampler_weights", "N")),
        ("sampler_weights/M/N", ("M", "sampler_weights", "N")),
        ("M/N", ("M", "weights", "N")),
        ("N.1-a_b", ("me", "weights", "N.1-a_b")),
    ],
)
def test_spellings(path: str, ref: tuple[str, str, str]):
    assert parse(path, "me", "path") == ref


@pytest.mark.parametrize(
    "path", ["", "..", "a/..", "../a", "/etc/passwd", "a/b/c", "file://a/weights/b", "xorl://a/b", "xorl://a/weights/b/c",
             "a..b", "xorl:///weights/a", "weights/a b", "a\n", "x" * 129, ".hidden", "weights/../n"]
)  # fmt: skip
def test_other_spellings_are_refused(path: str):
    with pytest.raises(InvalidRequest, match=r"^path:"):
        parse(path, "me", "path")


async def test_save_and_load(server: Server):
    await train(server)
    saved = await server.do("save_weights", {"path": "step-1", "seq_id": 5})
    assert saved == {"path": "xorl://default/weights/step-1", "type": "save_weights"}
    await train(server)
    assert server.engine.models["default"].weight == 2.0
    loaded = await server.do("load_weights", {"path": saved["path"], "optimizer": True})
    assert loaded == {"path": saved["path"], "type": "load_weights"}
    assert server.engine.models["default"].weight == 1.0
    assert (await server.do("optim_step", {}))["metrics"]["step"] == 2


@pytest.mark.parametrize(
    "spelling", ["xorl://a/weights/n", "tinker://a/weights/n", "weights/a/n", "weights/n", "a/n", "n"]
)
async def test_load_accepts_every_spelling(server: Server, spelling: str):
    await server.create("a")
    await server.do("save_weights", {"model_id": "a", "path": "n"})
    assert "path" in await server.do("load_weights", {"model_id": "a", "path": spelling})


async def test_saves_without_a_name_do_not_collide_and_sort_by_time(server: Server):
    paths = [(await server.do("save_weights", {}))["path"] for _ in range(5)]
    assert len(set(paths)) == 5
    listed = (await server.post("/api/v1/list_checkpoints", {}))["checkpoints"]
    assert [row["path"] for row in listed] == sorted(paths, reverse=True)


async def test_an_existing_name_fails_unless_overwritten(server: Server):
    await server.do("save_weights", {"path": "a"})
    failed = await server.do("save_weights", {"path": "a"})
    assert failed["category"] == "user"
    assert "exists already" in failed["error"]
    assert "path" in await server.do("save_weights", {"path": "a", "overwrite": True})


@pytest.mark.parametrize(
    "path", ["a/b", "..", "", "000000", "xorl://other/weights/a", "xorl://default/sampler_weights/a"]
)
async def test_bad_names_are_refused(server: Server, path: str):
    assert (await server.refused("save_weights", {"path": path})).startswith("path:")


async def test_a_checkpoint_can_be_loaded_before_its_save_is_done(server: Server):
    server.engine.gate.clear()
    refs = [await server.post(f"/api/v1/{call}", {"path": "a"}) for call in ("save_weights", "load_weights")]
    server.engine.gate.set()
    results = await asyncio.gather(*(server.retrieve(ref["request_id"]) for ref in refs))
    assert not any("error" in result for result in results)


async def test_loading_what_is_not_there_fails(server: Server):
    failed = await server.do("load_weights", {"path": "nope"})
    assert failed["category"] == "user"
    await server.do("save_weights_for_sampler", {"name": "s"})
    assert "inference" in await server.refused("load_weights", {"path": "sampler_weights/s"})


async def test_sampler_weights_are_kept_per_model_and_replaced(server: Server):
    for model_id in ("a", "b"):
        await server.create(model_id)
        for _ in range(2):
            saved = await server.do("save_weights_for_sampler", {"model_id": model_id, "name": "s", "seq_id": 7})
            assert saved == {"path": f"xorl://{model_id}/sampler_weights/s", "type": "save_weights_for_sampler"}


async def test_list_and_delete(server: Server):
    await server.do("save_weights", {"path": "a", "user_metadata": {"k": "v"}})
    await server.do("save_weights_for_sampler", {"name": "s"})
    sampler, training = (await server.post("/api/v1/list_checkpoints", {"model_id": "default"}))["checkpoints"]
    assert sampler["checkpoint_id"] == "sampler_weights/s"
    assert sampler["checkpoint_type"] == "sampler"
    assert training["path"] == "xorl://default/weights/a"
    assert training["tinker_path"] == "tinker://default/weights/a"
    assert training["user_metadata"] == {"k": "v"}
    assert training["size_bytes"] == 4096
    deleted = await server.post("/api/v1/delete_checkpoint", {"checkpoint_id": "weights/a"})
    assert deleted == {"success": True, "deleted_path": "xorl://default/weights/a", "error": None}
    await server.refused("delete_checkpoint", {"checkpoint_id": "weights/a"}, 404)
    await server.post("/api/v1/delete_checkpoint", {"checkpoint_id": "sampler_weights/default/s"})
    assert (await server.post("/api/v1/list_checkpoints", {}))["checkpoints"] == []
    await server.refused("delete_checkpoint", {"checkpoint_id": "weights/000000"}, 403)
    await server.refused("delete_checkpoint", {"checkpoint_id": "weights/../default"})
    await server.refused("list_checkpoints", {"model_id": "nope"})


async def test_a_folder_without_manifest_is_no_checkpoint(server: Server):
    await server.do("save_weights", {"path": "a"})
    (server.output_dir / "default/weights/a/manifest.json").unlink()
    (server.output_dir / "default/weights/b").mkdir()
    (server.output_dir / "default/weights/c").mkdir()
    (server.output_dir / "default/weights/c/manifest.json").write_text("{half of a")
    assert (await server.post("/api/v1/list_checkpoints", {}))["checkpoints"] == []


async def test_weights_info(server: Server):
    await server.create("a", alpha=16)
    await server.do("save_weights", {"model_id": "a", "path": "n"})
    info = await server.post("/api/v1/weights_info", {"xorl_path": "xorl://a/weights/n"})
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == ("tiny/base", True, 8)
    assert info == await server.post("/api/v1/weights_info", {"tinker_path": "tinker://a/weights/n"})
    assert (info["train_attn"], info["train_mlp"], info["train_unembed"]) == (True, True, False)
    await server.refused("weights_info", {"xorl_path": "xorl://a/weights/nope"}, 404)
    await server.refused("weights_info", {"xorl_path": "a/n"})
    await server.refused("weights_info", {}, 422)


async def test_training_runs(server: Server):
    for model_id in ("a", "b", "c"):
        await server.create(model_id)
    await server.do("save_weights", {"model_id": "a", "path": "n"})
    page = await server.get("/api/v1/training_runs?limit=2&offset=0")
    assert page["cursor"] == {"offset": 0, "limit": 2, "total_count": 3}
    first = page["training_runs"][0]
    assert first["training_run_id"] == "a"
    assert first["last_checkpoint"]["checkpoint_id"] == "weights/n"
    assert (first["is_lora"], first["lora_rank"], first["corrupted"]) == (True, 8, False)
    assert len((await server.get("/api/v1/training_runs?limit=2&offset=2"))["training_runs"]) == 1


async def test_checkpoints_and_runs_survive_a_restart(server: Server, tmp_path):
    await server.create("a")
    await train(server, "a")
    await server.do("save_weights", {"model_id": "a", "path": "n"})
    async with running(tmp_path) as second:
        assert [run["training_run_id"] for run in (await second.get("/api/v1/training_runs"))["training_runs"]] == ["a"]
        assert len((await second.post("/api/v1/list_checkpoints", {"model_id": "a"}))["checkpoints"]) == 1
        await second.create("a")
        await second.do("load_weights", {"model_id": "a", "path": "xorl://a/weights/n"})
        assert second.engine.models["a"].weight == 1.0


async def test_a_time_to_live_ends(server: Server):
    plane = server.app.state.plane
    await server.do("save_weights", {"path": "a", "ttl_seconds": 3600})
    await server.do("save_weights", {"path": "b"})
    rows = (await server.post("/api/v1/list_checkpoints", {}))["checkpoints"]
    assert [row["expires_at"] is None for row in rows] == [True, False]
    plane.store.set_expiry(plane.checkpoints.directory(CheckpointRef("default", "weights", "a")), 1.0)
    rows = (await server.post("/api/v1/list_checkpoints", {}))["checkpoints"]
    assert [row["checkpoint_id"] for row in rows] == ["weights/b"]
    assert not (server.output_dir / "default/weights/a").exists()
    await server.do("save_weights", {"path": "a"})
    assert len((await server.post("/api/v1/list_checkpoints", {}))["checkpoints"]) == 2
