"""Pushes into servers that speak SGLang's protocol and really join the update group."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from builders import sync_into
from sync.fake_sglang import FakeSglang
from xorl.engine.commands import Endpoint, EndpointReport, SyncReport, SyncWeights
from xorl.errors import InvalidRequest, NonFinite
from xorl.quantization import Fp8
from xorl.sync.broadcast import ReferenceBroadcast
from xorl.sync.disk import Shelf
from xorl.sync.formats import Weight
from xorl.sync.push import WeightSync
from xorl_kernels.fp8_quantize import Lora, reference

BUCKET_BYTES = 1000
TIMEOUT_S = 5.0


@pytest.fixture
def start() -> Iterator:
    with ExitStack() as stack:
        yield lambda **kinds: stack.enter_context(FakeSglang(**kinds).serving())


@pytest.fixture
def sync() -> Iterator[WeightSync]:
    sync = WeightSync(TIMEOUT_S, torch.device("cpu"))
    yield sync
    sync.close()


def weight(name: str, tensor: Tensor) -> Weight:
    return Weight(name, tensor, tensor.dtype)


def model(seed: int) -> list[Weight]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        weight("embed.weight", random(33, 31)),  # larger than a bucket
        weight("norm.weight", random(17)),
        weight("scale", random(1, dtype=torch.float32)),
        weight("q.weight", random(9, 16).T),
        *(weight(f"{i}.weight", random(i + 1, 7)) for i in range(40)),
        weight("head.bias", random(5, dtype=torch.float32)),
    ]


def command(*servers: FakeSglang, **changes: object) -> SyncWeights:
    return sync_into(*(server.port for server in servers), **{"bucket_bytes": BUCKET_BYTES, **changes})


def assert_serves(server: FakeSglang, weights: list[Weight]) -> None:
    assert server.weights.keys() == {weight.name for weight in weights}
    for weight in weights:
        torch.testing.assert_close(server.weights[weight.name], weight.tensor, rtol=0, atol=0)
    assert not server.paused
    assert not server.session


def outcome(report: SyncReport) -> list[bool]:
    return [endpoint.success for endpoint in report.endpoints]


def test_a_push_arrives_bit_for_bit_and_in_order(start, sync):
    server, weights = start(), model(0)
    report = sync.push(command(server, weight_version="v7"), weights)
    unchecked = "its model's config, m, is not readable here, so names, shapes and quantization are unchecked"
    assert report.endpoints == [EndpointReport("127.0.0.1", server.port, True, unchecked)]
    assert_serves(server, weights)
    assert server.version == "v7"
    assert report.num_parameters == len(weights)
    assert report.total_bytes == sum(weight.tensor.nbytes for weight in weights)
    assert report.num_buckets == server.num_buckets > 4
    order = list(dict.fromkeys(server.calls))
    assert order == [
        "/server_info",
        "/pause_generation",
        "/init_weights_update_group",
        "/begin_weight_update",
        "/update_weights_from_distributed",
        "/end_weight_update",
        "/update_weight_version",
        "/flush_cache",
        "/continue_generation",
    ]


def test_a_server_without_update_sessions_takes_a_push(start, sync):
    server, weights = start(sessions=False), model(0)
    assert outcome(sync.push(command(server), weights)) == [True]
    assert_serves(server, weights)


def test_the_group_is_kept_and_rebuilt_when_membership_changes(start, sync):
    one, two = start(), start()
    for seed in (0, 1):
        assert outcome(sync.push(command(one), model(seed))) == [True]
        assert_serves(one, model(seed))
    assert one.calls.count("/init_weights_update_group") == 1
    assert outcome(sync.push(command(one, two), model(2))) == [True, True]
    assert_serves(one, model(2))
    assert_serves(two, model(2))
    assert list(one.groups) == list(two.groups) == ["weight_sync_group"]
    sync.close()
    assert not one.groups
    assert not two.groups


def test_the_reference_broadcaster_pushes_too(start, sync, monkeypatch):
    monkeypatch.setattr("xorl.sync.broadcast._C", None)
    monkeypatch.setattr("xorl.sync.link.bucket_broadcast", lambda group, *rest: ReferenceBroadcast(group, 0, *rest))
    server, weights = start(), model(0)
    assert outcome(sync.push(command(server), weights)) == [True]
    assert_serves(server, weights)


@pytest.mark.parametrize("bucket_idx", [0, 2])
def test_an_endpoint_that_dies_falls_out_and_the_others_get_everything(start, sync, bucket_idx):
    dying, other, weights = start(die_at=bucket_idx), start(), model(0)
    report = sync.push(command(dying, other), weights)
    assert outcome(report) == [False, True]
    assert "stays paused" in report.endpoints[0].message
    assert_serves(other, weights)
    assert dying.paused
    dying.groups.clear()
    assert outcome(sync.push(command(dying, other), model(1))) == [True, True], "it comes back"
    assert_serves(dying, model(1))
    assert_serves(other, model(1))


def test_an_endpoint_that_stalls_is_dropped_within_the_timeout(start, sync):
    other, stalling, weights = start(), start(stall_at=1), model(0)
    report = sync.push(command(other, stalling), weights)
    assert outcome(report) == [True, False]
    assert "no answer within 5 s" in report.endpoints[1].message
    assert_serves(other, weights)


def test_a_refused_load_is_reported_and_leaves_the_endpoint_paused(start, sync):
    server, other = start(), start()
    server.refuse["/update_weights_from_distributed"] = "shape mismatch for embed.weight"
    report = sync.push(command(server, other), model(0))
    assert outcome(report) == [False, True]
    assert "shape mismatch for embed.weight" in report.endpoints[0].message
    assert server.paused
    assert_serves(other, model(0))


@pytest.mark.parametrize(
    "path", ["/server_info", "/pause_generation", "/init_weights_update_group", "/begin_weight_update"]
)
def test_who_falls_out_before_any_weights_goes_on_with_the_old_ones(start, sync, path):
    server, other = start(), start()
    server.refuse[path] = "not today"
    report = sync.push(command(server, other), model(0))
    assert outcome(report) == [False, True]
    assert report.endpoints[0].message == f"127.0.0.1:{server.port} {path}: not today"
    assert not server.paused
    assert not server.weights
    assert_serves(other, model(0))


def test_an_endpoint_that_is_not_there_is_reported(sync):
    with FakeSglang().serving() as server:
        pass
    report = sync.push(command(server), model(0))
    assert outcome(report) == [False]
    assert report.total_bytes == report.num_buckets == 0


def test_a_restarted_server_is_met_again_without_a_failure(start, sync):
    server = start()
    sync.push(command(server), model(0))
    server.groups.clear()
    server.session = True
    assert outcome(sync.push(command(server), model(1))) == [True]
    assert_serves(server, model(1))


def test_a_name_that_an_earlier_trainer_left_behind_is_no_obstacle(start, sync):
    server = start()
    server.groups["weight_sync_group"] = None
    assert outcome(sync.push(command(server), model(1))) == [True]
    assert_serves(server, model(1))


def test_a_weight_that_cannot_be_made_fails_the_sync_and_not_the_next_one(start, sync):
    server, weights = start(), model(0)
    weights[-1].tensor[2] = torch.nan
    report = sync.push(command(server), weights)
    assert outcome(report) == [False]
    assert report.endpoints[0].message.startswith("head.bias: NaN or infinite")
    assert server.paused, "it has a mixture"
    assert outcome(sync.push(command(server), model(1))) == [True]
    assert_serves(server, model(1))
    assert server.calls.count("/init_weights_update_group") == 1


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"quantization": "fp8"}, "its config at m is not readable here: say how they are quantised"),
        ({"quantization": "awq"}, "it serves awq weights; only plain and FP8 ones can be sent"),
        ({"tp_size": 2}, "register it with world_size 2"),
    ],
)
def test_a_server_that_cannot_take_the_weights_is_refused_by_name(start, sync, info, why):
    server = start()
    server.info |= info
    report = sync.push(command(server), model(0))
    assert outcome(report) == [False]
    assert why in report.endpoints[0].message
    assert "/pause_generation" not in server.calls


@pytest.mark.parametrize(
    ("changes", "flushed"),
    [
        ({"cache_mode": "auto"}, True),
        ({"cache_mode": "auto", "pause_mode": "in_place"}, False),
        ({"cache_mode": "auto", "pause_mode": "in_place", "flush_cache": True}, True),
        ({"cache_mode": "none"}, False),
        ({"cache_mode": "none", "flush_cache": True}, True),
        ({"cache_mode": "flush", "pause_mode": "in_place"}, True),
    ],
)
def test_the_cache_is_flushed_as_asked(start, sync, changes, flushed):
    server = start()
    assert outcome(sync.push(command(server, **changes), model(0))) == [True]
    assert ("/flush_cache" in server.calls) is flushed


def test_a_refused_flush_is_a_remark(start, sync):
    server = start()
    server.running = True
    report = sync.push(command(server, cache_mode="flush", pause_mode="in_place"), model(0))
    assert outcome(report) == [True]
    assert "/flush_cache: requests are running" in report.endpoints[0].message


def test_what_cannot_be_sent_is_refused_by_name(start, sync):
    server = start()
    with pytest.raises(InvalidRequest, match=r"^q.weight: whether servers quantise it is not known"):
        sync.push(command(server, quantization=Fp8()), model(0)[3:4])
    with pytest.raises(InvalidRequest, match=r"^a.weight: torch.float16 cannot be synced"):
        sync.push(command(server), [weight("a.weight", torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(NonFinite, match=r"^a.weight: NaN or infinite"):
        sync.push(command(server), [weight("a.weight", torch.full((2, 2), torch.inf).requires_grad_())])
    assert "/pause_generation" not in server.calls


def test_a_port_that_is_taken_is_refused_by_name(start, sync):
    server = start()
    with pytest.raises(InvalidRequest, match="master_address, master_port: cannot listen"):
        sync.push(command(server, master_port=server.port), model(0))
    assert not server.paused


def test_a_server_without_buckets_gets_tensor_by_tensor(start, sync):
    old, new, weights = start(version="0.5.3", sessions=False), start(), model(0)
    report = sync.push(command(old, new), weights)
    assert outcome(report) == [True, True]
    assert_serves(old, weights)
    assert_serves(new, weights)
    assert report.num_buckets == old.num_buckets + new.num_buckets


def test_the_two_phases_of_xorl_sglang(start, sync):
    fork, stock, weights = start(two_phase=True), start(), model(0)
    assert outcome(sync.push(command(fork, stock), weights)) == [True, True]
    assert_serves(fork, weights)
    assert_serves(stock, weights)
    assert fork.post_processed == 1, "with the last bucket"
    assert fork.groups.keys() == stock.groups.keys(), "both in one group"


def test_servers_that_ask_for_a_key_get_it_and_nobody_else_sees_it(start, sync):
    server, weights = start(api_key="secret"), model(0)
    ask = command(server)
    assert outcome(sync.push(ask, weights)) == [False]
    endpoint = Endpoint("127.0.0.1", server.port, api_key="secret")
    report = sync.push(msgspec.structs.replace(ask, endpoints=[endpoint]), weights)
    assert outcome(report) == [True]
    assert_serves(server, weights)
    assert "secret" not in repr(ask) + repr(endpoint) + repr(report)
    sync.close()


CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=4
)


def llama(seed: int) -> list[Weight]:
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    return [weight(name, parameter.detach()) for name, parameter in network.named_parameters()]


@pytest.fixture
def shelved(tmp_path: Path) -> Iterator[WeightSync]:
    """One that has a folder for servers that cannot join a group."""
    sync = WeightSync(TIMEOUT_S, torch.device("cpu"), Shelf(tmp_path / "shelf", CONFIG))
    yield sync
    sync.close()


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"dp_size": 2}, "2 data-parallel replicas"),
        ({"pp_size": 2}, "2 pipeline stages"),
        ({"device": "cuda"}, "it is on cuda and we are on cpu"),
    ],
)
def test_who_cannot_join_a_group_reads_from_disk(start, sync, shelved, info, why):
    apart, other, weights = start(**info), start(), llama(0)
    refused = sync.push(command(apart), weights)
    assert outcome(refused) == [False]
    assert why in refused.endpoints[0].message
    assert not apart.weights
    report = shelved.push(command(apart, other, weight_version="v5"), weights)
    assert outcome(report) == [True, True]
    assert f"{why}" in report.endpoints[0].message
    assert "loaded the weights from disk" in report.endpoints[0].message
    assert_serves(apart, weights)
    assert_serves(other, weights)
    assert (apart.version, apart.groups) == ("v5", {})


def test_who_refuses_to_join_reads_from_disk(start, shelved):
    proud, other = start(), start()
    proud.refuse["/init_weights_update_group"] = "not with you"
    report = shelved.push(command(proud, other), llama(0))
    assert outcome(report) == [True, True]
    assert "not with you, so it loaded the weights from disk" in report.endpoints[0].message
    assert_serves(proud, llama(0))
    assert_serves(other, llama(0))


def test_a_folder_stays_for_as_long_as_a_server_may_come_back_to_it(start, shelved, tmp_path):
    one, two = start(dp_size=2), start(dp_size=2)
    shelved.push(command(one, two), llama(0))
    shelved.push(command(one), llama(1))
    assert len(list((tmp_path / "shelf").iterdir())) == 2
    shelved.push(command(one, two), llama(2))
    (folder,) = (tmp_path / "shelf").iterdir()
    assert one.info["model_path"] == two.info["model_path"] == str(folder)
    assert AutoConfig.from_pretrained(folder).hidden_size == 16


def test_a_folder_that_a_server_does_not_see_leaves_it_as_it_was(start, shelved):
    far = start(dp_size=2)
    far.refuse["/update_weights_from_disk"] = "Failed to get weights iterator: no such folder"
    report = shelved.push(command(far), llama(0))
    assert outcome(report) == [False]
    assert "no such folder" in report.endpoints[0].message
    assert not far.paused


def test_a_load_from_disk_that_fails_midway_leaves_it_paused(start, shelved):
    server = start(dp_size=2)
    server.refuse["/update_weights_from_disk"] = "Failed to update weights: bad shape. Rolling back"
    assert outcome(shelved.push(command(server), llama(0))) == [False]
    assert server.paused


def test_phases_tell_where_the_time_went(start, shelved):
    report = shelved.push(command(start(), start(dp_size=2), verify=True), llama(0))
    parts = {"probe", "pause", "connect", "transfer", "disk", "commit", "verify", "resume"}
    assert parts | {"total", "produce", "broadcast", "load", "hidden"} == report.seconds.keys()
    assert sum(report.seconds[part] for part in parts) <= report.seconds["total"]
    assert 0 <= report.seconds["hidden"] <= report.seconds["produce"] <= report.seconds["transfer"]
    assert report.seconds["hidden"] <= report.seconds["broadcast"] + report.seconds["load"]


def test_verified_weights_are_those_that_were_sent(start, sync):
    server = start(device="cpu")
    report = sync.push(command(server, verify=True), model(0))
    assert outcome(report) == [True]
    assert "verified" not in report.endpoints[0].message
    server.spoil = "0.weight"
    report = sync.push(command(server, verify=True), model(1))
    assert outcome(report) == [False]
    assert "0.weight is not what was sent" in report.endpoints[0].message
    assert server.paused


def test_where_checksums_cannot_be_foretold_servers_are_compared(start, shelved):
    one, two = start(device="cuda"), start(device="cuda")
    report = shelved.push(command(one, verify=True), llama(0))
    assert outcome(report) == [True]
    assert "no other server is like it" in report.endpoints[0].message
    report = shelved.push(command(one, two, verify=True), llama(0))
    assert outcome(report) == [True, True]
    assert "verified" not in report.endpoints[0].message + report.endpoints[1].message
    two.spoil = "model.norm.weight"
    report = shelved.push(command(one, two, verify=True), llama(1))
    assert outcome(report) == [False, False]
    assert "hold different weights" in report.endpoints[0].message


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WIDE = LlamaConfig(
    vocab_size=40, hidden_size=192, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, head_dim=128
)


@pytest.fixture
def quantised(tmp_path: Path) -> str:
    """The folder of an FP8 model that leaves one layer as it is."""
    WIDE.save_pretrained(tmp_path / "quantised")
    config = tmp_path / "quantised" / "config.json"
    fields = json.loads(config.read_text())
    form = BLOCKS | {"modules_to_not_convert": ["model.layers.1"]}
    config.write_text(json.dumps(fields | {"quantization_config": form}))
    return str(config.parent)


def merged(seed: int) -> list[Weight]:
    """A model with an adapter on every projection."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(WIDE, dtype=torch.bfloat16)
    return [
        Weight(name, parameter.detach(), torch.bfloat16, lora_for(parameter) if "_proj" in name else None)
        for name, parameter in network.named_parameters()
    ]


def lora_for(matrix: Tensor) -> Lora:
    rows, cols = matrix.shape
    return Lora(torch.randn(4, cols) * 0.1, torch.randn(rows, 4) * 0.1, 0.5)


def merge(weight: Weight) -> Tensor:
    return reference.merge(weight.tensor, weight.lora)


def assert_serves_codes(server: FakeSglang, weights: list[Weight]) -> None:
    """The codes and scales of layer 0's projections are those of the merged weights; the rest is plain."""
    for weight in weights:
        served = server.weights.pop(weight.name)
        if "layers.0" in weight.name and "_proj" in weight.name:
            codes, scales = reference.quantize(merge(weight))
            torch.testing.assert_close(served.float(), codes.float(), rtol=0, atol=0)
            torch.testing.assert_close(server.weights.pop(f"{weight.name}_scale_inv"), scales, rtol=0, atol=0)
        else:
            torch.testing.assert_close(served, merge(weight), rtol=0, atol=0)
    assert not server.weights


@pytest.mark.parametrize("bucket_bytes", [1000, 70_000, 1 << 20])
def test_an_fp8_server_gets_the_codes_and_scales_of_merged_weights(start, sync, quantised, bucket_bytes):
    server, weights = start(model_path=quantised), merged(0)
    report = sync.push(command(server, bucket_bytes=bucket_bytes), weights)
    assert report.endpoints == [EndpointReport("127.0.0.1", server.port, True, "")]
    assert report.total_bytes == sum(tensor.nbytes for tensor in server.weights.values())
    assert_serves_codes(server, weights)


def test_servers_of_different_forms_are_pushed_one_form_after_the_other(start, sync, quantised, tmp_path):
    WIDE.save_pretrained(tmp_path / "plain")
    plain, blocks, other = start(model_path=str(tmp_path / "plain")), start(model_path=quantised), start()
    for seed in range(2):
        report = sync.push(command(plain, blocks, other), merged(seed))
        assert outcome(report) == [True] * 3
        for server in (plain, other):
            for weight in merged(seed):
                torch.testing.assert_close(server.weights[weight.name], merge(weight), rtol=0, atol=0)
        assert_serves_codes(blocks, merged(seed))
        for server in (plain, blocks, other):
            assert not server.paused
            assert server.calls.count("/init_weights_update_group") == 1, "groups are kept"
    assert report.num_parameters == len(merged(0))


def test_a_form_that_fails_leaves_the_other_form_whole(start, sync, quantised, tmp_path):
    WIDE.save_pretrained(tmp_path / "plain")
    plain, blocks = start(model_path=str(tmp_path / "plain"), die_at=1), start(model_path=quantised)
    assert outcome(sync.push(command(plain, blocks), merged(0))) == [False, True]
    assert_serves_codes(blocks, merged(0))
    assert plain.paused


def test_a_server_that_takes_no_fp8_is_refused_and_the_other_is_not(start, sync, quantised, tmp_path):
    WIDE.save_pretrained(tmp_path / "plain")
    plain, blocks = start(model_path=str(tmp_path / "plain")), start(model_path=quantised)
    asked = Fp8("block", not_converted=("model.layers.1",))
    report = sync.push(command(plain, blocks, quantization=asked), merged(0))
    assert outcome(report) == [False, True]
    assert "would be misread" in report.endpoints[0].message
    assert "/pause_generation" not in plain.calls
    assert_serves_codes(blocks, merged(0))


def test_fp8_weights_on_disk_say_how_they_are_quantised(start, quantised, tmp_path):
    sync = WeightSync(TIMEOUT_S, torch.device("cpu"), Shelf(tmp_path / "shelf", WIDE))
    server = start(model_path=quantised, dp_size=2)
    for seed in range(2):  # the second one reads the folder of the first
        assert outcome(sync.push(command(server), merged(seed))) == [True]
        assert_serves_codes(server, merged(seed))
    sync.close()
