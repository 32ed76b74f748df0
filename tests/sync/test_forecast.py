"""Plans on paper: models of every size, by configs written from their published dimensions."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.test_plan import limits, models
from xorl.quantization import Fp8
from xorl.sync.forecast import Costs, forecast, sends
from xorl.sync.paper import weights_of
from xorl.sync.plan import lay_out
from xorl.sync.produce import Plan

LLAMA_3_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}
QWEN3_235B_A22B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12_288,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
}
TRILLION = QWEN3_235B_A22B | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_experts": 384,
    "moe_intermediate_size": 2048,
    "vocab_size": 163_840,
}
"""A mixture as wide, deep and finely cut as Kimi-K2, with Qwen3's attention."""

PARAMETERS_G = {
    "llama-3-70b": (LLAMA_3_70B, 70.6),
    "qwen3-235b-a22b": (QWEN3_235B_A22B, 235.1),
    "1t": (TRILLION, 1041.7),
}
BUCKET_BYTES = 2**30


def write(config: dict[str, object], folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", PARAMETERS_G)
def test_a_config_alone_gives_the_plan_of_a_model_that_fits_nowhere_here(name, tmp_path):
    config, parameters_g = PARAMETERS_G[name]
    buckets = Plan.of(weights_of(write(config, tmp_path)), None, BUCKET_BYTES).buckets
    items = [item for bucket in buckets for item in bucket.items]
    num_items = sum(item.values.num_items for item in items)
    assert num_items / 1e9 == pytest.approx(parameters_g, rel=1e-3)
    assert sum(bucket.num_bytes for bucket in buckets) == 2 * num_items
    names = {item.values.name for item in items}
    assert len(names) == len(items)
    assert not any(".experts.gate_up_proj" in name for name in names), "servers know experts one by one"
    assert ("model.layers.0.mlp.experts.127.down_proj.weight" in names) == ("num_experts" in config)


def test_no_weight_has_memory(tmp_path):
    assert all(weight.tensor.is_meta for weight in weights_of(write(TRILLION, tmp_path)))


def test_fp8_sends_half_of_the_layers_bytes_and_their_scales(tmp_path):
    weights = weights_of(write(LLAMA_3_70B, tmp_path))
    plain, codes = (
        {item.values.name: item for bucket in Plan.of(weights, fp8, BUCKET_BYTES).buckets for item in bucket.items}
        for fp8 in (None, Fp8())
    )
    assert plain.keys() == codes.keys()
    for name, item in codes.items():
        if item.scales is None:
            assert item == plain[name]
        else:
            assert 2 * item.values.num_bytes == plain[name].num_bytes
    assert {name for name, item in codes.items() if item.scales is None} == {
        name for name in plain if "norm" in name or name in ("model.embed_tokens.weight", "lm_head.weight")
    }


costs = st.builds(Costs, *[st.floats(1, 1e12)] * 3, *[st.floats(0, 10)] * 2)


@given(models(), limits, costs, st.integers(2, 500), st.sampled_from(["nccl", "gloo"]))
def test_no_sync_is_predicted_faster_than_the_link_or_the_producer(items, limit, costs, members, backend):
    buckets = lay_out(items, limit)
    num_bytes = sum(bucket.num_bytes for bucket in buckets)
    predicted = forecast(buckets, costs, members, backend)
    tolerance = 1 - 1e-9
    assert min(predicted) >= 0
    assert predicted.total_s >= tolerance * num_bytes / costs.ingress
    assert predicted.total_s >= tolerance * (num_bytes / costs.produce + costs.pause_s)


@given(models(), limits, costs, st.integers(2, 500))
def test_a_faster_link_never_predicts_a_slower_sync(items, limit, costs, members):
    buckets = lay_out(items, limit)
    slow, fast = (forecast(buckets, costs._replace(ingress=rate * costs.ingress), members, "nccl") for rate in (1, 2))
    assert fast.total_s <= slow.total_s * (1 + 1e-9)


def test_an_empty_plan_costs_its_pause():
    assert forecast([], Costs(1e9), 2, "nccl").total_s == Costs(1e9).pause_s


def test_a_tree_sends_each_byte_once_a_level():
    assert [sends(members, "gloo") for members in (2, 3, 4, 5, 8, 9)] == [1, 2, 2, 3, 3, 4]
    assert sends(500, "nccl") == 1
