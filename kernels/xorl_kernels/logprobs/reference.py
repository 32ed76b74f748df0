"""The plain PyTorch twin of the log-probabilities kernel; also the CPU path.

T: tokens; N: the tokens with a target; C: those of one chunk; K: targets a token; H: hidden size; V: vocabulary;
R: rank of the tail.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100


def logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_TK: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    tail: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    device = hidden_TH.device
    rows_N = (targets_TK != IGNORED).any(dim=1).nonzero().squeeze(1).to(device, non_blocking=True)
    targets_NK = targets_TK.to(device, non_blocking=True).index_select(0, rows_N)
    hidden_NH = hidden_TH.index_select(0, rows_N)
    if tail is None and not weight_VH.requires_grad and targets_NK.shape[1] == 1:
        logprobs_NK = _FrozenHead.apply(hidden_NH, weight_VH, targets_NK, temperature, chunk_tokens)
    else:
        xa_TR, b_VR = tail or (None, None)
        xa_NR = None if xa_TR is None else xa_TR.index_select(0, rows_N)
        logprobs_NK = _AnyHead.apply(hidden_NH, weight_VH, targets_NK, temperature, chunk_tokens, xa_NR, b_VR)
    return torch.zeros(targets_TK.shape, device=device).index_copy(0, rows_N, logprobs_NK)


class _FrozenHead(torch.autograd.Function):
    """A head without gradient and one target a token: ∂l/∂h is one row a token, made while its logits are there.

    The backward scales these rows, so no logits are computed twice: 4 N H V operations where _AnyHead needs 6 N H V.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N1: Tensor, temperature: float, chunk_tokens: int
    ) -> Tensor:
        logprobs_N1 = torch.empty(targets_N1.shape, device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden_NH), chunk_tokens):
            logits_CV = _logits(hidden_NH[rows], weight_VH, temperature, None, None)
            logprobs_N1[rows], _, sum_C1 = _score(logits_CV, targets_N1[rows])
            if slope_NH is not None:
                dlogits_CV = _dlogits(logits_CV, sum_C1, targets_N1[rows], torch.ones_like(sum_C1), temperature)
                slope_NH[rows] = _matmul(dlogits_CV.to(weight_VH.dtype), weight_VH).to(slope_NH.dtype)
        ctx.save_for_backward(slope_NH)
        return logprobs_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope_NH,), (grad_N1,) = ctx.saved_tensors, grads
        return (slope_NH * grad_N1).to(slope_NH.dtype), None, None, None, None


class _AnyHead(torch.autograd.Function):
    """Saves its inputs and the log-sum-exp of each row; the backward computes the logits of each chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_NK: Tensor,
        temperature: float,
        chunk_tokens: int,
        xa_NR: Tensor | None,
        b_VR: Tensor | None,
    ) -> Tensor:
        logprobs_NK = torch.empty(targets_NK.shape, device=hidden_NH.device)
        lse_N1 = torch.empty(len(hidden_NH), 1, device=hidden_NH.device)
        for rows in _chunks(len(hidden_NH), chunk_tokens):
            logits_CV = _logits(hidden_NH[rows], weight_VH, temperature, _take(xa_NR, rows), b_VR)
            logprobs_NK[rows], max_C1, sum_C1 = _score(logits_CV, targets_NK[rows])
            lse_N1[rows] = max_C1 + sum_C1.log()
        ctx.save_for_backward(hidden_NH, weight_VH, targets_NK, lse_N1, xa_NR, b_VR)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return logprobs_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_NH, weight_VH, targets_NK, lse_N1, xa_NR, b_VR = ctx.saved_tensors
        (grad_NK,) = grads
        needs_hidden, needs_weight, _, _, _, needs_xa, needs_b = ctx.needs_input_grad
        dhidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        dxa_NR = torch.empty_like(xa_NR) if needs_xa else None
        db_VR = torch.zeros_like(b_VR, dtype=torch.float32) if needs_b else None
        for rows in _chunks(len(hidden_NH), ctx.chunk_tokens):
            logits_CV = _logits(hidden_NH[rows], weight_VH, ctx.temperature, _take(xa_NR, rows), b_VR)
            softmax_CV = logits_CV.sub_(lse_N1[rows]).exp_()
            ones_C1 = torch.ones_like(lse_N1[rows])
            dlogits_CV = _dlogits(softmax_CV, ones_C1, targets_NK[rows], grad_NK[rows], ctx.temperature)
            if dxa_NR is not None:
                dxa_NR[rows] = dlogits_CV @ b_VR.float()
            if db_VR is not None:
                db_VR.addmm_(dlogits_CV.T, xa_NR[rows].float())
            dlogits_CV = dlogits_CV.to(weight_VH.dtype)
            if dhidden_NH is not None:
                dhidden_NH[rows] = _matmul(dlogits_CV, weight_VH).to(dhidden_NH.dtype)
            if dweight_VH is not None:
                dweight_VH += _matmul(dlogits_CV.T, hidden_NH[rows])
        return (
            dhidden_NH,
            None if dweight_VH is None else dweight_VH.to(weight_VH.dtype),
            None,
            None,
            None,
            dxa_NR,
            None if db_VR is None else db_VR.to(b_VR.dtype),
        )


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def _take(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _logits(
    hidden_CH: Tensor, weight_VH: Tensor, temperature: float, xa_CR: Tensor | None, b_VR: Tensor | None
) -> Tensor:
    logits_CV = _matmul(hidden_CH, weight_VH.T)
    if xa_CR is not None and b_VR is not None:
        logits_CV.addmm_(xa_CR.float(), b_VR.float().T)
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def _score(logits_CV: Tensor, targets_CK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the targets (0 where ignored), and each row's max and Σ_v exp(z_v − max).

    The memory of the logits then holds exp(z − max): a second [C, V] would cost more time than the arithmetic.
    """
    target_CK = logits_CV.gather(1, targets_CK.clamp(min=0))
    max_C1 = logits_CV.amax(dim=1, keepdim=True)
    sum_C1 = logits_CV.sub_(max_C1).exp_().sum(dim=1, keepdim=True)
    logprobs_CK = target_CK - max_C1 - sum_C1.log()
    return logprobs_CK.masked_fill(targets_CK == IGNORED, 0.0), max_C1, sum_C1


def _dlogits(exp_CV: Tensor, sum_C1: Tensor, targets_CK: Tensor, grad_CK: Tensor, temperature: float) -> Tensor:
    """Σ_k g_k (onehot(target_k) − exp / sum) / temperature, in the memory of the exponentials."""
    grad_CK = grad_CK.masked_fill(targets_CK == IGNORED, 0.0) / temperature
    dlogits_CV = exp_CV.mul_(-grad_CK.sum(dim=1, keepdim=True) / sum_C1)
    return dlogits_CV.scatter_add_(1, targets_CK.clamp(min=0), grad_CK)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32; on CUDA from half-precision operands without upcasting them."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
