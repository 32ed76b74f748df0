"""Checksums that are foretold from what is sent are those of the parameters that servers make of it."""

from hashlib import sha256

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3MoeConfig

from xorl.quantization import Fp8
from xorl.sync.formats import Weight
from xorl.sync.produce import Plan, in_new_memory, tensors_in
from xorl.sync.receiver import ServerInfo
from xorl.sync.verify import Expected, is_foretold
from xorl_kernels.fp8_quantize import dequantize, fp8_quantize

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OURS = ServerInfo(device="cpu", dtype="float32", dequantizes=True)
SGLANG = ServerInfo(device="cpu", dtype="float32")


def network(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "dense":
        config = Qwen2Config(**SIZES, intermediate_size=48)  # has biases
    else:
        config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=3, intermediate_size=48)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def checksum(*parts: Tensor) -> str:
    whole = torch.cat([part.detach().float().flatten() for part in parts])
    return sha256(whole.numpy().tobytes()).hexdigest()[:16]


def expected(info: ServerInfo, model: PreTrainedModel, fp8: Fp8 | None = None, bucket_bytes: int = 3000) -> Expected:
    weights = [Weight(name, parameter.detach(), parameter.dtype) for name, parameter in model.named_parameters()]
    plan, result = Plan.of(weights, fp8, bucket_bytes), Expected(info)
    for _ in range(2):  # the second time after a failure
        result.clear()
        for bucket in plan.buckets:
            result.add(bucket, tensors_in(bucket, in_new_memory(plan.packer(bucket))))
    return result


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_our_samplers_parameters(kind):
    model = network(kind)
    theirs = {name: checksum(parameter) for name, parameter in model.named_parameters()}
    assert expected(OURS, model).difference(theirs) is None
    name = next(iter(theirs))
    assert expected(OURS, model).difference(theirs | {name: "0" * 16}) == name


@pytest.mark.parametrize("bucket_bytes", [1, 1000, 3000, 5500, 100_000])
def test_sglangs_fused_parameters(bucket_bytes):
    model = network("dense")
    own = dict(model.named_parameters())
    theirs = {name: checksum(parameter) for name, parameter in own.items() if "_proj" not in name}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for kind in ("weight", "bias"):
            parts = [own[f"{attention}.{part}_proj.{kind}"] for part in "qkv"]
            theirs[f"{attention}.qkv_proj.{kind}"] = checksum(*parts)
        theirs[f"{attention}.o_proj.weight"] = checksum(own[f"{attention}.o_proj.weight"])
        gate_up = [own[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up")]
        theirs[f"{mlp}.gate_up_proj.weight"] = checksum(*gate_up)
        theirs[f"{mlp}.down_proj.weight"] = checksum(own[f"{mlp}.down_proj.weight"])
    assert expected(SGLANG, model, bucket_bytes=bucket_bytes).difference(theirs) is None
    swapped = theirs | {f"{mlp}.gate_up_proj.weight": checksum(*reversed(gate_up))}
    assert expected(SGLANG, model).difference(swapped) == f"{mlp}.gate_up_proj.weight"


def test_sglangs_experts():
    model = network("experts")
    own = dict(model.named_parameters())
    theirs = {name: checksum(parameter) for name, parameter in own.items() if "_proj" not in name}
    for layer in range(2):
        attention, experts = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp.experts"
        theirs[f"{attention}.qkv_proj.weight"] = checksum(*(own[f"{attention}.{part}_proj.weight"] for part in "qkv"))
        theirs[f"{attention}.o_proj.weight"] = checksum(own[f"{attention}.o_proj.weight"])
        theirs[f"{experts}.w13_weight"] = checksum(own[f"{experts}.gate_up_proj"])
        theirs[f"{experts}.w2_weight"] = checksum(own[f"{experts}.down_proj"])
    assert expected(SGLANG, model).difference(theirs) is None


def test_codes_are_compared_by_the_weights_that_they_stand_for():
    model = network("dense")
    theirs = {
        name: checksum(dequantize(*fp8_quantize(parameter.detach())) if "_proj.weight" in name else parameter)
        for name, parameter in model.named_parameters()
    }
    assert expected(OURS, model, Fp8()).difference(theirs) is None
    assert expected(OURS, model).difference(theirs) is not None


def test_unknown_names_are_no_difference():
    with pytest.raises(LookupError, match=r"^model\."):
        expected(SGLANG, network("dense")).difference({"transformer.wte.weight": "0" * 16})


@pytest.mark.parametrize(("info", "told"), [({}, True), ({"tp_size": 2}, False), ({"device": "cuda"}, False)])
def test_only_a_cpus_checksums_of_one_rank_are_foretold(info, told):
    assert is_foretold(ServerInfo(**{"device": "cpu", **info})) is told
