"""Linear layers with many LoRA adapters in one batch, for projections that share their input.

T: tokens; I, O: inputs and outputs of the projections side by side; Q: outputs of one; R: an adapter's rank.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xorl_kernels.dispatch import use_triton
from xorl_kernels.fp8_quantize import dequantize
from xorl_kernels.fused_lora import reference
from xorl_kernels.fused_lora.layout import Layout, Pair, Segment

__all__ = ["Base", "Pair", "Segment", "fused_lora"]


class Base(NamedTuple):
    """Projections of one input, such as q, k and v, with their weights stacked: `sizes` are the outputs of each.

    Weights may be e4m3 codes, with the scales of their 128 × 128 blocks for each projection.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    sizes: tuple[int, ...]
    scales: tuple[Tensor, ...] = ()


def fused_lora(x_TI: Tensor, base: Base, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """y = x Wᵀ + b, plus scale · (x Aᵀ) Bᵀ on the tokens of each segment.

    The gradients of A and B are added to their .grad in place, by one launch for all adapters, where autograd would
    need one for each; so they come from backward() and not from torch.autograd.grad(). A token's adapter gets nothing
    from other tokens, and two runs on one input give the same bits.

    Args:
        x_TI: activations, bfloat16 or float32.
        base: of x's dtype, frozen or trained; or FP8 and frozen, of which one plain weight exists at a time.
        segments: disjoint, in ascending order; tokens outside of all see the base alone. A and B are float32 masters,
            cast to x's dtype for the products.

    Returns:
        [T, Q] in x's dtype for each projection, parts of one tensor; differentiable once in x, W, b and every A and B.

    Raises:
        ValueError: segments overlap or leave the batch.
    """
    return with_steps(_steps(x_TI), x_TI, base, segments)


def with_steps(steps: ModuleType, x_TI: Tensor, base: Base, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """As `fused_lora`, computed by `steps`: the module `reference` or `kernel`."""
    layout = Layout(segments, base.sizes, len(x_TI))
    return _FusedLora.apply(x_TI, base.weight_OI, base.bias_O, base.scales, layout, steps, *layout.factors)


def _plain(weight_OI: Tensor, scales: Sequence[Tensor], sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight to multiply with; what is FP8 becomes plain for each product anew, at 3 bytes a weight."""
    if not scales:
        return weight_OI
    plain_OI = torch.empty_like(weight_OI, dtype=dtype)
    for codes_QI, its_scales, plain_QI in zip(weight_OI.split(sizes), scales, plain_OI.split(sizes), strict=True):
        dequantize(codes_QI, its_scales, plain_QI)
    return plain_OI


def _steps(x_TI: Tensor) -> ModuleType:
    if not use_triton(x_TI) or x_TI.dtype != torch.bfloat16:
        return reference
    from xorl_kernels.fused_lora import kernel  # Triton is not installed everywhere

    return kernel


class _FusedLora(torch.autograd.Function):
    """Saves x and s = scale · x Aᵀ, [T, R]; the backward passes once over each dy and once over x."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        scales: tuple[Tensor, ...],
        layout: Layout,
        steps: ModuleType,
        *factors: Tensor,  # only so that autograd knows of them: the layout has them too
    ) -> tuple[Tensor, ...]:
        s_TR = steps.shrink(x_TI, layout)
        y_TO = steps.linear(x_TI, _plain(weight_OI, scales, layout.sizes, x_TI.dtype), bias_O, s_TR, layout)
        ctx.save_for_backward(x_TI, weight_OI, s_TR)
        ctx.scales, ctx.layout, ctx.steps, ctx.num_factors = scales, layout, steps, len(factors)
        return y_TO.split(layout.sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, weight_OI, s_TR = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        ds_TR = ctx.steps.up_gradients(dys, s_TR, ctx.layout)
        ctx.steps.down_gradients(x_TI, ds_TR, ctx.layout)
        dx_TI = None
        if needs_x:
            plain_OI = _plain(weight_OI, ctx.scales, ctx.layout.sizes, x_TI.dtype)
            dx_TI = ctx.steps.input_gradient(dys, plain_OI, ds_TR, ctx.layout)
        return (
            dx_TI,
            torch.cat([dy_TQ.T @ x_TI for dy_TQ in dys]) if needs_weight else None,
            torch.cat([dy_TQ.sum(dim=0) for dy_TQ in dys]) if needs_bias else None,
            None,
            None,
            None,
            *[None] * ctx.num_factors,
        )
