"""The form in which each weight travels, and its bytes."""

import pytest
import torch
from torch import Tensor

from xorl.errors import InvalidRequest, NonFinite
from xorl.quantization import Fp8
from xorl.sync.formats import Weight, is_quantized, one_by_one, wire_items
from xorl.sync.plan import Item, TensorSpec, lay_out
from xorl.sync.produce import Plan, in_new_memory, refuse_nonfinite, tensors_in
from xorl_kernels.fp8_quantize import Lora, dequantize, fp8_quantize

BLOCKS = Fp8("block", not_converted=("model.layers.1",))


def weight(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, **more: object) -> Weight:
    generator = torch.Generator().manual_seed(len(name))
    return Weight(name, torch.randn(shape, generator=generator).to(dtype), dtype, **more)


def adapter(rows: int, cols: int) -> Lora:
    return Lora(torch.randn(4, cols), torch.randn(rows, 4), 0.5)


def produced(weights: list[Weight], fp8: Fp8 | None, bucket_bytes: int = 1 << 20) -> dict[str, Tensor]:
    plan = Plan.of(weights, fp8, bucket_bytes)
    made = [tensors_in(bucket, in_new_memory(plan.packer(bucket))) for bucket in plan.buckets]
    return {name: tensor for tensors in made for name, tensor in tensors.items()}


def test_plain_weights_go_as_they_are():
    weights = [weight("a.weight", 5, 7), weight("norm.weight", 7, dtype=torch.float32), weight("a.bias", 5)]
    tensors = produced(weights, None)
    assert list(tensors) == ["norm.weight", "a.weight", "a.bias"], "wide items first"
    for each in weights:
        torch.testing.assert_close(tensors[each.name], each.tensor, rtol=0, atol=0)


def test_a_weight_goes_in_the_dtype_of_its_checkpoint():
    """Full training keeps float32 masters of a bfloat16 model."""
    master = weight("a.weight", 5, 7, dtype=torch.float32)._replace(dtype=torch.bfloat16)
    torch.testing.assert_close(produced([master], None)["a.weight"], master.tensor.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["block", "channel", "tensor"])
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_linear_layers_go_as_codes_and_scales(form, merged):
    lora = adapter(200, 130) if merged else None
    layer = weight("model.layers.0.mlp.up_proj.weight", 200, 130, lora=lora)
    suffix = "_scale_inv" if form == "block" else "_scale"
    tensors = produced([layer], Fp8(form))
    assert tensors.keys() == {layer.name, layer.name + suffix}
    whole = layer.tensor.float() if lora is None else layer.tensor.float() + _product(lora)
    codes, scales = fp8_quantize(whole.bfloat16(), form)
    torch.testing.assert_close(tensors[layer.name].float(), codes.float(), rtol=0, atol=0)
    torch.testing.assert_close(tensors[layer.name + suffix], scales, rtol=0, atol=0)
    close = dequantize(tensors[layer.name], tensors[layer.name + suffix])
    torch.testing.assert_close(close, whole, rtol=1 / 16, atol=whole.abs().max().item() / 448)


def _product(lora: Lora) -> Tensor:
    return lora.scale * (lora.b_OR.bfloat16().float() @ lora.a_RI.bfloat16().float())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), True),
        ("model.layers.0.mlp.experts.3.down_proj.weight", (8, 8), True),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.layers.0.mlp.gate.weight", (4, 8), False),
        ("model.embed_tokens.weight", (9, 8), False),
        ("lm_head.weight", (9, 8), False),
        ("model.layers.1.self_attn.q_proj.weight", (8, 8), False),
    ],
)
def test_what_servers_quantise(name, shape, expected):
    assert is_quantized(weight(name, *shape), BLOCKS) is expected


def test_an_unknown_matrix_is_not_guessed_at():
    with pytest.raises(InvalidRequest, match=r"^model.layers.0.mixer.in_proj.weight: whether servers quantise it"):
        is_quantized(weight("model.layers.0.mixer.in_proj.weight", 8, 8), BLOCKS)


def test_stacked_experts_go_one_by_one_in_the_order_of_servers():
    gate_up, down = weight("m.experts.gate_up_proj", 3, 10, 8), weight("m.experts.down_proj", 3, 8, 5)
    tensors = produced([gate_up, down], None)
    parts = [each.name for each in one_by_one([gate_up, down])]
    assert parts == [
        *(f"m.experts.{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up")),
        *(f"m.experts.{i}.down_proj.weight" for i in range(3)),
    ]
    assert tensors.keys() == set(parts)
    for i in range(3):
        both = torch.cat([tensors[f"m.experts.{i}.{part}_proj.weight"] for part in ("gate", "up")])
        torch.testing.assert_close(both, gate_up.tensor[i], rtol=0, atol=0)
        torch.testing.assert_close(tensors[f"m.experts.{i}.down_proj.weight"], down.tensor[i], rtol=0, atol=0)


def test_a_plan_needs_names_and_shapes_alone():
    with torch.device("meta"):
        absent = [
            Weight("model.layers.0.mlp.up_proj.weight", torch.empty(200, 130), torch.bfloat16),
            Weight("m.experts.down_proj", torch.empty(2, 8, 5), torch.float32),
        ]
    items = wire_items(one_by_one(absent), BLOCKS)
    assert items[0] == Item(
        TensorSpec("model.layers.0.mlp.up_proj.weight", "float8_e4m3fn", (200, 130)),
        TensorSpec("model.layers.0.mlp.up_proj.weight_scale_inv", "float32", (2, 2)),
    )
    assert sum(bucket.num_bytes for bucket in lay_out(items, 1000)) == 200 * 130 + 4 * 4 + 2 * (8 * 5 + 4)


def test_dtypes_that_cannot_travel_are_refused_by_name():
    with pytest.raises(InvalidRequest, match=r"^a.weight: torch.float16 cannot be synced; only float32, bfloat16"):
        wire_items([weight("a.weight", 2, 2, dtype=torch.float16)], None)


def test_a_trained_weight_that_is_not_finite_is_found_before_anything_is_sent():
    broken = adapter(2, 2)
    broken.b_OR[0] = torch.nan
    broken.b_OR.requires_grad_()
    with pytest.raises(NonFinite, match=r"^bad.weight: NaN"):
        refuse_nonfinite([weight("good.weight", 2, 2), weight("bad.weight", 2, 2, lora=broken)])


@pytest.mark.parametrize("fp8", [None, Fp8()])
def test_a_merge_that_overflows_is_found_when_it_is_made(fp8):
    huge = Lora(torch.full((1, 8), 3e38), torch.full((8, 1), 3e38), 1.0)
    with pytest.raises(NonFinite, match=r"^m.up_proj.weight: NaN or infinite"):
        produced([weight("m.up_proj.weight", 8, 8, lora=huge)], fp8)
