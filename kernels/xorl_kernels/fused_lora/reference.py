"""The plain PyTorch twin of the fused LoRA steps; also the CPU path.

T: tokens; S: those of one span; I, O: inputs and outputs; Q: outputs of one projection; R: ranks side by side, as in
layout.py.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xorl_kernels.fused_lora.layout import Layout, Pair, Span, gradient_of, padded


def shrink(x_TI: Tensor, layout: Layout) -> Tensor:
    """s = scale · x Aᵀ of each span's adapter, [T, R]; 0 where there is none."""
    s_TR = x_TI.new_zeros(len(x_TI), layout.num_ranks)
    for start, stop, adapter, scale in layout.spans:
        a_RI = _stacked(layout.adapters[adapter], x_TI.dtype)
        s_TR[start:stop, : len(a_RI)] = F.linear(x_TI[start:stop], a_RI) * scale
    return s_TR


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, s_TR: Tensor, layout: Layout) -> Tensor:
    """y = x Wᵀ + b + s Bᵀ, [T, O]."""
    y_TO = F.linear(x_TI, weight_OI, bias_O)
    for span, p, pair, ranks in _products(layout):
        tokens, outputs = slice(span.start, span.stop), slice(*layout.outputs[p : p + 2])
        y_TO[tokens, outputs].addmm_(s_TR[tokens, ranks], pair.b_OR.to(x_TI.dtype).T)
    return y_TO


def up_gradients(dys: Sequence[Tensor], s_TR: Tensor, layout: Layout) -> Tensor:
    """ds = scale · dy B, [T, R]; adds dB = dyᵀ s. `dys` has [T, Q] for each projection."""
    ds_TR = torch.zeros_like(s_TR)
    for span, p, pair, ranks in _products(layout):
        tokens = slice(span.start, span.stop)
        dy_SQ = dys[p][tokens]
        ds_TR[tokens, ranks] = (dy_SQ @ pair.b_OR.to(dy_SQ.dtype)) * span.scale
        if (db_QR := gradient_of(pair.b_OR)) is not None:
            db_QR.addmm_(dy_SQ.T.float(), s_TR[tokens, ranks].float())
    return ds_TR


def down_gradients(x_TI: Tensor, ds_TR: Tensor, layout: Layout) -> None:
    """Adds dA = dsᵀ x."""
    for span, _, pair, ranks in _products(layout):
        tokens = slice(span.start, span.stop)
        if (da_RI := gradient_of(pair.a_RI)) is not None:
            da_RI.addmm_(ds_TR[tokens, ranks].T.float(), x_TI[tokens].float())


def input_gradient(dys: Sequence[Tensor], weight_OI: Tensor, ds_TR: Tensor, layout: Layout) -> Tensor:
    """dx = dy W + ds A, [T, I]."""
    dx_TI, *others = (dy_TQ @ w_QI for dy_TQ, w_QI in zip(dys, weight_OI.split(layout.sizes), strict=True))
    for other_TI in others:
        dx_TI += other_TI
    for start, stop, adapter, _ in layout.spans:
        a_RI = _stacked(layout.adapters[adapter], dx_TI.dtype)
        dx_TI[start:stop].addmm_(ds_TR[start:stop, : len(a_RI)], a_RI)
    return dx_TI


def _products(layout: Layout) -> Iterator[tuple[Span, int, Pair, slice]]:
    """Each span with each projection that its adapter changes, and the columns of the ranks that do."""
    for span in layout.spans:
        members = zip(layout.adapters[span.adapter], layout.columns[span.adapter], strict=True)
        for p, (pair, ranks) in enumerate(members):
            if pair is not None:
                yield span, p, pair, ranks


def _stacked(pairs: Sequence[Pair | None], dtype: torch.dtype) -> Tensor:
    """The A of each pair below the other, with zeros between them as in s."""
    factors = [pair.a_RI for pair in pairs if pair is not None]
    return torch.cat([F.pad(a_RI, (0, 0, 0, padded(len(a_RI)) - len(a_RI))) for a_RI in factors]).to(dtype)
