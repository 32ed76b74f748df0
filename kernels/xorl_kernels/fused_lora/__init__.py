"""Linear layers with many LoRA adapters in one batch.

T: tokens; I, O: inputs and outputs; R: an adapter's rank.
"""

from collections.abc import Sequence

from torch import Tensor

from xorl_kernels.fused_lora import reference
from xorl_kernels.fused_lora.reference import Segment

__all__ = ["Segment", "fused_lora"]


def fused_lora(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, segments: Sequence[Segment]) -> Tensor:
    """y = x Wᵀ + b, plus s (x Aᵀ) Bᵀ on the tokens of each segment.

    Args:
        x_TI: activations, bfloat16 or float32.
        weight_OI: base weight, of x's dtype.
        bias_O: or None.
        segments: disjoint, in ascending order; A and B are float32 masters, cast to x's dtype for the products.

    Returns:
        [T, O] in x's dtype, differentiable in x, W, b and every A and B.
    """
    return reference.fused_lora(x_TI, weight_OI, bias_O, segments)
