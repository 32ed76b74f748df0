"""Pushes into servers that speak SGLang's protocol and really join the update group."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from sync.fake_sglang import FakeSglang
from xorl.engine.commands import Endpoint, EndpointReport, SyncReport, SyncWeights
from xorl.errors import InvalidRequest, NonFinite
from xorl.quantization import Fp8
from xorl.sync.broadcast import ReferenceBroadcast
from xorl.sync.formats import Weight
from xorl.sync.push import WeightSync

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
    fields: dict[str, object] = {
        "model_id": "default",
        "endpoints": [Endpoint("127.0.0.1", server.port) for server in servers],
        "master_address": "",
        "master_port": 0,
        "group_name": "weight_sync_group",
        "bucket_bytes": BUCKET_BYTES,
        "flush_cache": False,
        "cache_mode": "auto",
        "pause_mode": "retract",
        "weight_version": None,
        "quantization": None,
    }
    return SyncWeights(**fields | changes)  # pyright: ignore[reportArgumentType]


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


def test_what_cannot_be_sent_is_refused_by_name(sync):
    with pytest.raises(InvalidRequest, match=r"^q.weight: whether servers quantise it is not known"):
        sync.push(command(quantization=Fp8()), model(0)[3:4])
    with pytest.raises(InvalidRequest, match=r"^a.weight: torch.float16 cannot be synced"):
        sync.push(command(), [weight("a.weight", torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(NonFinite, match=r"^a.weight: NaN or infinite"):
        sync.push(command(), [weight("a.weight", torch.full((2, 2), torch.inf).requires_grad_())])


def test_a_port_that_is_taken_is_refused_by_name(start, sync):
    server = start()
    with pytest.raises(InvalidRequest, match="master_address, master_port: cannot listen"):
        sync.push(command(server, master_port=server.port), model(0))
    assert not server.paused
