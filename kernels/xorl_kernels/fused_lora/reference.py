"""The plain PyTorch twin of the fused LoRA linear layer; also the CPU path.

T: tokens; S: those of one segment; I, O: inputs and outputs; R: an adapter's rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segment(NamedTuple):
    """Tokens start..stop of a batch and the adapter that acts on them."""

    start: int
    stop: int
    a_RI: Tensor
    b_OR: Tensor
    scale: float


def fused_lora(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, segments: Sequence[Segment]) -> Tensor:
    y_TO = F.linear(x_TI, weight_OI, bias_O)
    pieces, done = [], 0
    for start, stop, a_RI, b_OR, scale in segments:
        xa_SR = F.linear(x_TI[start:stop], a_RI.to(x_TI.dtype)) * scale
        pieces += [y_TO[done:start], torch.addmm(y_TO[start:stop], xa_SR, b_OR.to(x_TI.dtype).T)]
        done = stop
    return torch.cat([*pieces, y_TO[done:]]) if pieces else y_TO
