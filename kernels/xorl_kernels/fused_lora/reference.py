"""The plain PyTorch twin of the fused LoRA steps; also the CPU path.

T: tokens; N: the spans of one run, which are computed as one batch; S: tokens of one span; I, O: inputs and outputs;
Q: outputs of one projection; R: ranks side by side, as in layout.py.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xorl_kernels.fused_lora.layout import Layout, Pair, Span, gradient_of, padded


def shrink(x_TI: Tensor, layout: Layout) -> Tensor:
    """s = scale · x Aᵀ of each span's adapter, [T, R]; 0 where there is none."""
    s_TR = x_TI.new_zeros(len(x_TI), layout.num_ranks)
    for run in layout.runs:
        a_NRI = _stacked_a(run, layout, x_TI.dtype)
        _of_run(s_TR[:, : a_NRI.shape[1]], run).copy_((_of_run(x_TI, run) @ a_NRI.mT) * run[0].scale)
    return s_TR


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, s_TR: Tensor, layout: Layout) -> Tensor:
    """y = x Wᵀ + b + s Bᵀ, [T, O]."""
    y_TO = F.linear(x_TI, weight_OI, bias_O)
    for run, p, pairs, ranks in _products(layout):
        b_NQR = _stacked([pair.b_OR for pair in pairs], x_TI.dtype)
        outputs = slice(*layout.outputs[p : p + 2])
        _of_run(y_TO[:, outputs], run).baddbmm_(_of_run(s_TR[:, ranks], run), b_NQR.mT)
    return y_TO


def up_gradients(dys: Sequence[Tensor], s_TR: Tensor, layout: Layout) -> Tensor:
    """ds = scale · dy B, [T, R]; adds dB = dyᵀ s. `dys` has [T, Q] for each projection."""
    ds_TR = torch.zeros_like(s_TR)
    for run, p, pairs, ranks in _products(layout):
        dy_NSQ = _of_run(dys[p], run)
        b_NQR = _stacked([pair.b_OR for pair in pairs], dy_NSQ.dtype)
        _of_run(ds_TR[:, ranks], run).copy_((dy_NSQ @ b_NQR) * run[0].scale)
        _add_products([pair.b_OR for pair in pairs], dy_NSQ, _of_run(s_TR[:, ranks], run))
    return ds_TR


def down_gradients(x_TI: Tensor, ds_TR: Tensor, layout: Layout) -> None:
    """Adds dA = dsᵀ x."""
    for run, _, pairs, ranks in _products(layout):
        _add_products([pair.a_RI for pair in pairs], _of_run(ds_TR[:, ranks], run), _of_run(x_TI, run))


def input_gradient(dys: Sequence[Tensor], weight_OI: Tensor, ds_TR: Tensor, layout: Layout) -> Tensor:
    """dx = dy W + ds A, [T, I]."""
    dx_TI, *others = (dy_TQ @ w_QI for dy_TQ, w_QI in zip(dys, weight_OI.split(layout.sizes), strict=True))
    for other_TI in others:
        dx_TI += other_TI
    for run in layout.runs:
        a_NRI = _stacked_a(run, layout, dx_TI.dtype)
        _of_run(dx_TI, run).baddbmm_(_of_run(ds_TR[:, : a_NRI.shape[1]], run), a_NRI)
    return dx_TI


def _of_run(x: Tensor, run: Sequence[Span]) -> Tensor:
    """[T, ...] -> [N, S, ...], a view."""
    return x[run[0].start : run[-1].stop].unflatten(0, (len(run), -1))


def _products(layout: Layout) -> Iterator[tuple[list[Span], int, list[Pair], slice]]:
    """Each run with each projection that its adapters change, and the columns of the ranks that do."""
    for run in layout.runs:
        for p, ranks in enumerate(layout.columns[run[0].adapter]):
            if pairs := _pairs(run, p, layout):
                yield run, p, pairs, ranks


def _pairs(run: Sequence[Span], p: int, layout: Layout) -> list[Pair]:
    """Of each span; none at all where the adapters leave the projection alone."""
    return [pair for span in run if (pair := layout.adapters[span.adapter][p]) is not None]


def _stacked(factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(factors).to(dtype) if len(factors) > 1 else factors[0][None].to(dtype)


def _stacked_a(run: Sequence[Span], layout: Layout, dtype: torch.dtype) -> Tensor:
    """[N, R, I], the A of an adapter's pairs below the other, with zeros between them as in s."""
    of_projections = []
    for p in range(len(layout.sizes)):
        if pairs := _pairs(run, p, layout):
            a_NRI = _stacked([pair.a_RI for pair in pairs], dtype)
            rank = a_NRI.shape[1]
            of_projections.append(F.pad(a_NRI, (0, 0, 0, padded(rank) - rank)))
    return torch.cat(of_projections, dim=1)


def _add_products(factors: Sequence[Tensor], left_NSR: Tensor, right_NSI: Tensor) -> None:
    """Adds leftᵀ right of each span to the gradient of its factor."""
    gradients = [gradient_of(factor) for factor in factors]
    if len(gradients) == 1 and gradients[0] is not None:
        gradients[0].addmm_(left_NSR[0].T.float(), right_NSI[0].float())
        return
    products = (left_NSR.mT.float() @ right_NSI.float()).unbind()
    trained = [(g, product) for g, product in zip(gradients, products, strict=True) if g is not None]
    if trained:
        torch._foreach_add_([g for g, _ in trained], [product for _, product in trained])
