"""xorl_kernels.fused_lora against the formula in float64, one token at a time.

T: tokens; I, O: inputs and outputs; R: an adapter's rank.
"""

import pytest
import torch
from torch import Tensor

from xorl_kernels.fused_lora import Segment, fused_lora

torch.set_num_threads(1)

T, IN, OUT = 37, 20, 28
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=3e-2, atol=6e-2)}

# (start, stop, rank, scale) of each segment
LAYOUTS = {
    "no adapter": [],
    "one for all": [(0, 37, 4, 2.0)],
    "rank 1": [(0, 37, 1, 0.5)],
    "many, of many ranks": [(0, 5, 8, 1.0), (5, 6, 1, 2.0), (6, 20, 16, 0.25), (20, 37, 3, -1.0)],
    "gaps": [(3, 9, 4, 1.0), (12, 13, 2, 3.0), (30, 35, 4, 1.0)],
    "an empty segment": [(0, 10, 4, 1.0), (10, 10, 2, 1.0), (10, 37, 4, 1.0)],
    "rank above the width": [(4, 30, 40, 1.0)],
    "scale 0": [(4, 30, 4, 0.0)],
}


def tensors(layout: list[tuple[int, int, int, float]], dtype: torch.dtype) -> list[Tensor]:
    """x, W, bias in `dtype`, then float32 A and B of each segment."""
    torch.manual_seed(len(layout))
    base = [(torch.randn(shape) / 4).to(dtype) for shape in ((T, IN), (OUT, IN), (OUT,))]
    pairs = [torch.randn(shape) / 4 for _, _, rank, _ in layout for shape in ((rank, IN), (OUT, rank))]
    return base + pairs


def segments(layout: list[tuple[int, int, int, float]], pairs: list[Tensor]) -> list[Segment]:
    return [
        Segment(start, stop, pairs[2 * i], pairs[2 * i + 1], scale) for i, (start, stop, _, scale) in enumerate(layout)
    ]


def oracle(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, segments: list[Segment]) -> Tensor:
    rows = []
    for token, x_I in enumerate(x_TI):
        y_O = weight_OI @ x_I + (0 if bias_O is None else bias_O)
        for segment in segments:
            if segment.start <= token < segment.stop:
                y_O = y_O + segment.scale * (segment.b_OR @ (segment.a_RI @ x_I))
        rows.append(y_O)
    return torch.stack(rows)


def values_and_gradients(function, layout, inputs: list[Tensor], with_bias: bool) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    x_TI, weight_OI, bias_O, *pairs = leaves
    y_TO = function(x_TI, weight_OI, bias_O if with_bias else None, segments(layout, pairs))
    factors_TO = torch.randn(y_TO.shape, generator=torch.Generator().manual_seed(1)).to(y_TO.dtype)
    wanted = leaves if with_bias else [x_TI, weight_OI, *pairs]
    return [y_TO, *torch.autograd.grad((y_TO * factors_TO).sum(), wanted, materialize_grads=True)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(layout, dtype, with_bias):
    inputs = tensors(layout, dtype)
    actual = values_and_gradients(fused_lora, layout, inputs, with_bias)
    expected = values_and_gradients(oracle, layout, [x.double() for x in inputs], with_bias)
    assert [x.dtype for x in actual[:2]] == [dtype, dtype]
    assert all(x.dtype == torch.float32 for x in actual[3 + with_bias :])  # master weights get float32 gradients
    for ours, theirs in zip(actual, expected, strict=True):
        # relative to the largest entry: in bfloat16 every sum of products loses the last bits of its terms
        scale = theirs.abs().amax().clamp(min=1) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double() / scale, theirs / scale, **TOLERANCE[dtype])


def test_b_zero_is_the_base_layer():
    x_TI, weight_OI, bias_O, a_RI, b_OR = tensors(LAYOUTS["one for all"], torch.bfloat16)
    y_TO = fused_lora(x_TI, weight_OI, bias_O, [Segment(0, T, a_RI, torch.zeros_like(b_OR), 2.0)])
    assert torch.equal(y_TO, torch.nn.functional.linear(x_TI, weight_OI, bias_O))


def test_a_segment_does_not_see_its_neighbours():
    layout = LAYOUTS["many, of many ranks"]
    x_TI, weight_OI, bias_O, *pairs = tensors(layout, torch.float32)
    together_TO = fused_lora(x_TI, weight_OI, bias_O, segments(layout, pairs))
    for start, stop, a_RI, b_OR, scale in segments(layout, pairs):
        alone = fused_lora(x_TI[start:stop], weight_OI, bias_O, [Segment(0, stop - start, a_RI, b_OR, scale)])
        torch.testing.assert_close(together_TO[start:stop], alone, rtol=1e-6, atol=1e-6)


def test_one_adapter_in_two_segments_adds_its_gradients():
    x_TI, weight_OI, _, a_RI, b_OR = tensors(LAYOUTS["one for all"], torch.float32)
    whole = [Segment(0, T, a_RI, b_OR, 1.0)]
    split = [Segment(0, 11, a_RI, b_OR, 1.0), Segment(11, T, a_RI, b_OR, 1.0)]
    pair = [a_RI.requires_grad_(), b_OR.requires_grad_()]
    grads = [torch.autograd.grad(fused_lora(x_TI, weight_OI, None, s).square().sum(), pair) for s in (whole, split)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_frozen_base_gets_no_gradient():
    x_TI, weight_OI, bias_O, a_RI, b_OR = tensors(LAYOUTS["one for all"], torch.float32)
    fused_lora(x_TI, weight_OI, bias_O, [Segment(0, T, a_RI.requires_grad_(), b_OR, 1.0)]).sum().backward()
    assert a_RI.grad is not None
    assert weight_OI.grad is None


def test_non_contiguous_inputs():
    layout = LAYOUTS["gaps"]
    x_TI, weight_OI, bias_O, *pairs = tensors(layout, torch.float32)
    strided = [x.T.contiguous().T for x in (x_TI, weight_OI, *pairs)]
    actual = fused_lora(strided[0], strided[1], bias_O, segments(layout, strided[2:]))
    torch.testing.assert_close(actual, fused_lora(x_TI, weight_OI, bias_O, segments(layout, pairs)))
