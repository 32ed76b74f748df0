"""Weights that arrive over an update group or from disk are the ones served, whole or not at all."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from sampler.serving import Client, Json, drive, generate, ok, refused
from tiny import save_tiny_model
from xorl_kernels.fp8_quantize import dequantize, fp8_quantize

PROMPT = [5, 6, 7, 8]
GREEDY = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0}
TIMEOUT = timedelta(seconds=30)
Weights = dict[str, torch.Tensor]


class Trainer:
    """Rank 0 of an update group of two, as a trainer makes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)

    async def connect(self, client: Client) -> None:
        joined = asyncio.create_task(ok(client, "/init_weights_update_group", self.address()))
        chain = PrefixStore("cpu/", PrefixStore(f"{self.name}/", PrefixStore(self.name, self._store)))
        self._group = await asyncio.to_thread(ProcessGroupGloo, chain, 0, 2, TIMEOUT)
        self._group._set_sequence_number_for_group()
        await joined

    def address(self) -> Json:
        return {
            "master_address": "127.0.0.1",
            "master_port": self._store.port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": self.name,
            "backend": "gloo",
        }

    def announce(self, weights: Weights, **fields: object) -> Json:
        return {
            "names": list(weights),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
            "shapes": [list(tensor.shape) for tensor in weights.values()],
            "group_name": self.name,
        } | fields

    @contextmanager
    def sending(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        thread = threading.Thread(target=lambda: [self._group.broadcast(tensor, 0).wait() for tensor in tensors])
        thread.start()
        yield
        thread.join()


def flat(weights: Weights) -> torch.Tensor:
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in weights.values()])


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=9)


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_pushed_weights_are_served(tiny_model: Path, other_model: Path, load_format: str | None) -> None:
    weights = load_file(other_model / "model.safetensors")
    halves = [dict(list(weights.items())[:9]), dict(list(weights.items())[9:])]

    async def scenario(client: Client) -> None:
        before = await generate(client, PROMPT, GREEDY)
        trainer = Trainer("push")
        await trainer.connect(client)
        assert "push" in await refused(client, "/init_weights_update_group", trainer.address())
        await ok(client, "/pause_generation", {"mode": "retract"})
        await ok(client, "/begin_weight_update")
        await refused(client, "/begin_weight_update")
        for half in halves:
            tensors = list(half.values()) if load_format is None else [flat(half)]
            with trainer.sending(tensors):
                body = trainer.announce(half, load_format=load_format, flush_cache=False, weight_version="v1")
                await ok(client, "/update_weights_from_distributed", body)
        await ok(client, "/end_weight_update")
        await refused(client, "/end_weight_update")
        await ok(client, "/continue_generation")
        after = await generate(client, PROMPT, GREEDY)
        await ok(client, "/destroy_weights_update_group", {"group_name": "push"})
        await refused(client, "/destroy_weights_update_group", {"group_name": "push"})
        assert after["output_ids"] != before["output_ids"]
        assert after["meta_info"]["weight_version"] == "v1"
        await equals_fresh(client, other_model)

    drive(tiny_model, scenario)


async def equals_fresh(client: Client, model: Path) -> None:
    """The served weights are those of `model`, to the bit."""
    served = await ok(client, "/weights_checker", {"action": "checksum"})

    async def compare(fresh: Client) -> None:
        assert (await ok(fresh, "/weights_checker"))["per_engine_checksum"] == served["per_engine_checksum"]

    await asyncio.to_thread(drive, model, compare)


def test_bad_updates_change_nothing_and_say_why(tiny_model: Path, other_model: Path) -> None:
    good = load_file(other_model / "model.safetensors")
    norm, head = good["model.norm.weight"], good["lm_head.weight"]

    async def scenario(client: Client) -> None:
        trainer = Trainer("bad")
        await trainer.connect(client)
        body = trainer.announce({"model.norm.weight": norm})
        assert "begin_weight_update" in await refused(client, "/update_weights_from_distributed", body)
        await ok(client, "/begin_weight_update")
        unknown_group = await refused(client, "/update_weights_from_distributed", body | {"group_name": "nobody"})
        assert "nobody" in unknown_group
        typo = body | {"dtypes": ["torch.float32"]}
        assert "torch.float32" in await refused(client, "/update_weights_from_distributed", typo)
        odd = trainer.announce({"a": norm.bfloat16()[:1], "b": norm}, load_format="flattened_bucket")
        assert "multiple" in await refused(client, "/update_weights_from_distributed", odd)
        wrong: dict[str, Weights] = {
            "model.nonsense": {"model.norm.weight": norm, "model.nonsense": norm},
            "lm_head.weight: shape": {"model.norm.weight": norm, "lm_head.weight": head[:5].contiguous()},
        }
        for named, weights in wrong.items():
            with trainer.sending(list(weights.values())):
                body = trainer.announce(weights)
                assert named in await refused(client, "/update_weights_from_distributed", body)
        await ok(client, "/end_weight_update")
        await equals_fresh(client, tiny_model)

    drive(tiny_model, scenario)


def test_tied_models_refuse_a_head(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tied", tied=True)
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"] + 1

    async def scenario(client: Client) -> None:
        trainer = Trainer("tied")
        await trainer.connect(client)
        await ok(client, "/begin_weight_update")
        with trainer.sending([embedding]):
            body = trainer.announce({"lm_head.weight": embedding})
            assert "tied" in await refused(client, "/update_weights_from_distributed", body)
        with trainer.sending([embedding.bfloat16()]):
            body = trainer.announce({"model.embed_tokens.weight": embedding.bfloat16()})
            await ok(client, "/update_weights_from_distributed", body)

    drive(model, scenario)


def test_updates_wait_for_running_rows_unless_paused(tiny_model: Path) -> None:
    long = {"max_new_tokens": 200, "ignore_eos": True}

    async def scenario(client: Client) -> None:
        running = asyncio.create_task(generate(client, PROMPT, long))
        await generate(client, [9], {"max_new_tokens": 2})
        await ok(client, "/begin_weight_update")
        await ok(client, "/pause_generation", {"mode": "abort"})
        assert (await running)["meta_info"]["finish_reason"]["type"] == "length"
        await ok(client, "/continue_generation")
        running = asyncio.create_task(generate(client, PROMPT, long))
        await generate(client, [9], {"max_new_tokens": 2})
        await ok(client, "/pause_generation", {"mode": "in_place"})
        await ok(client, "/end_weight_update")
        assert not running.done()
        await ok(client, "/continue_generation")
        assert len((await running)["output_ids"]) == 200

    drive(tiny_model, scenario)


def test_disk_updates_are_whole_or_nothing(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    weights = load_file(other_model / "model.safetensors")
    wrong: dict[str, Weights] = {
        "lacks": {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"},
        "shape": weights | {"lm_head.weight": weights["lm_head.weight"][:5].contiguous()},
        "model.extra": weights | {"model.extra": torch.ones(2)},
    }

    async def scenario(client: Client) -> None:
        before = await generate(client, PROMPT, GREEDY)
        assert "nowhere" in await refused(client, "/update_weights_from_disk", {"model_path": "/nowhere"})
        for named, tensors in wrong.items():
            (tmp_path / named).mkdir()
            save_file(tensors, tmp_path / named / "model.safetensors")
            body = {"model_path": str(tmp_path / named), "weight_version": "v1"}
            assert named in await refused(client, "/update_weights_from_disk", body)
        (tmp_path / "torn").mkdir()
        whole = (other_model / "model.safetensors").read_bytes()
        (tmp_path / "torn" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        assert "torn" in await refused(client, "/update_weights_from_disk", {"model_path": str(tmp_path / "torn")})
        same = await generate(client, PROMPT, GREEDY)
        assert same["output_ids"] == before["output_ids"]
        assert same["meta_info"]["weight_version"] == "default"
        await ok(client, "/update_weights_from_disk", {"model_path": str(other_model), "weight_version": "v1"})
        await equals_fresh(client, other_model)
        assert (await generate(client, PROMPT, GREEDY))["meta_info"]["weight_version"] == "v1"

    drive(tiny_model, scenario)


@pytest.fixture(scope="module")
def codes(other_model: Path) -> tuple[Weights, Weights]:
    """`other_model` with a projection in each FP8 form: as it travels, and as it is computed with."""
    plain = load_file(other_model / "model.safetensors")
    sent, rounded = dict(plain), dict(plain)
    projections = [name for name in plain if "_proj" in name]
    for name, form in zip(projections, ["block", "channel", "tensor"], strict=False):
        suffix = "_scale_inv" if form == "block" else "_scale"
        sent[name], sent[name + suffix] = fp8_quantize(plain[name], form)
        rounded[name] = dequantize(sent[name], sent[name + suffix])
    return dict(sorted(sent.items(), key=lambda item: -item[1].dtype.itemsize)), rounded


def test_pushed_codes_are_served_as_the_weights_that_they_stand_for(
    tiny_model: Path, codes: tuple[Weights, Weights], tmp_path: Path
) -> None:
    sent, rounded = codes

    async def scenario(client: Client) -> None:
        trainer = Trainer("codes")
        await trainer.connect(client)
        await ok(client, "/begin_weight_update")
        with trainer.sending([flat(sent)]):
            body = trainer.announce(sent, load_format="flattened_bucket")
            await ok(client, "/update_weights_from_distributed", body)
        await serves(client, rounded, tiny_model, tmp_path)

    drive(tiny_model, scenario)


def test_codes_on_disk_are_loaded_though_their_scales_are_in_another_file(
    tiny_model: Path, codes: tuple[Weights, Weights], tmp_path: Path
) -> None:
    sent, rounded = codes
    (tmp_path / "sent").mkdir()
    scales = {name: tensor for name, tensor in sent.items() if "_scale" in name}
    save_file(scales, tmp_path / "sent" / "a.safetensors")
    save_file({name: sent[name] for name in sent.keys() - scales}, tmp_path / "sent" / "b.safetensors")

    async def scenario(client: Client) -> None:
        await ok(client, "/update_weights_from_disk", {"model_path": str(tmp_path / "sent")})
        await serves(client, rounded, tiny_model, tmp_path)

    drive(tiny_model, scenario)


async def serves(client: Client, weights: Weights, like: Path, tmp_path: Path) -> None:
    """The client's sampler holds these weights of a model like `like`, to the bit."""
    folder = tmp_path / "rounded"
    shutil.copytree(like, folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    await equals_fresh(client, folder)


def test_codes_whose_scales_do_not_fit_change_nothing(tiny_model: Path, codes: tuple[Weights, Weights]) -> None:
    sent, _ = codes
    name = next(name for name, tensor in sent.items() if f"{name}_scale_inv" in sent)
    alone, scale = {name: sent[name]}, sent[f"{name}_scale_inv"]

    async def scenario(client: Client) -> None:
        trainer = Trainer("misfits")
        await trainer.connect(client)
        await ok(client, "/begin_weight_update")
        wrong = {f"{name}_scale_inv": torch.ones(3, 3), **alone}
        for weights, why in (
            (alone, "needs a scale"),
            (wrong, "do not fit"),
            ({"x_scale_inv": scale}, "no such weight"),
        ):
            with trainer.sending([flat(weights)]):
                body = trainer.announce(weights, load_format="flattened_bucket")
                assert why in await refused(client, "/update_weights_from_distributed", body)
        await equals_fresh(client, tiny_model)

    drive(tiny_model, scenario)
