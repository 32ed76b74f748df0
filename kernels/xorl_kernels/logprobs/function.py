"""Scores tokens a chunk at a time, and differentiates the scores.

T: tokens; N: the tokens with a target; C: those of one chunk; K: targets a token; J: most likely tokens asked for;
H: hidden size; V: vocabulary; R: rank of the tail.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xorl_kernels.logprobs.reference import IGNORED, Scored

Entropy = Literal["value", "differentiable"]


class TopK(NamedTuple):
    """float32 and int64; 0 and −100 for tokens without a target. No gradient."""

    logprobs_TJ: Tensor
    ids_TJ: Tensor


class Scores(NamedTuple):
    """All float32; 0 for tokens without a target."""

    logprobs_TK: Tensor
    entropy_T: Tensor | None
    top_k: TopK | None


class Steps(Protocol):
    """What happens to a chunk's logits between the products: `reference` says it in PyTorch, `kernel` in Triton."""

    def score(self, logits_CV: Tensor, targets_CK: Tensor, temperature: float, *, entropy: bool) -> Scored: ...

    def dlogits(
        self,
        logits_CV: Tensor,
        targets_CK: Tensor,
        scored: Scored,
        dlogprobs_CK: Tensor,
        dentropy_C1: Tensor | None,
        temperature: float,
        dtype: torch.dtype,
    ) -> Tensor: ...


class Ask(NamedTuple):
    """What is wanted of the hidden states, as in the package's `scores`, and who takes the steps."""

    steps: Steps
    temperature: float = 1.0
    chunk_tokens: int = 1024
    entropy: Entropy | None = None
    top_k: int = 0


class Inputs(NamedTuple):
    hidden_TH: Tensor
    weight_VH: Tensor
    xa_TR: Tensor | None
    b_VR: Tensor | None
    rows_N: Tensor  # the tokens with a target
    targets_NK: Tensor


class Chunk(NamedTuple):
    place: slice  # of its tokens among the N
    rows_C: Tensor  # and among the T
    hidden_CH: Tensor
    logits_CV: Tensor  # as `score` left them
    targets_CK: Tensor
    scored: Scored
    top_logits_CJ: Tensor
    top_ids_CJ: Tensor


def scores(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_TK: Tensor,
    tail: tuple[Tensor, Tensor] | None,
    ask: Ask,
) -> Scores:
    """As the package's `scores`."""
    if not torch.is_grad_enabled():
        hidden_TH = hidden_TH.detach()  # or the frozen head, which cannot see the mode, would make its slopes
    rows_N = (targets_TK != IGNORED).any(dim=1).nonzero().squeeze(1).to(hidden_TH.device, non_blocking=True)
    targets_NK = targets_TK.to(hidden_TH.device, non_blocking=True).index_select(0, rows_N)
    one_slope = targets_TK.shape[1] == 1 and ask.entropy != "differentiable"
    head = _FrozenHead if tail is None and not weight_VH.requires_grad and one_slope else _AnyHead
    logprobs_NK, entropy_N, top_NJ, ids_NJ = head.apply(
        hidden_TH, weight_VH, *(tail or (None, None)), rows_N, targets_NK, ask
    )

    def spread(x_N: Tensor, elsewhere: int = 0) -> Tensor:
        return x_N.new_full((len(hidden_TH), *x_N.shape[1:]), elsewhere).index_copy(0, rows_N, x_N)

    return Scores(
        spread(logprobs_NK),
        spread(entropy_N) if ask.entropy else None,
        TopK(spread(top_NJ), spread(ids_NJ, IGNORED)) if ask.top_k else None,
    )


class _FrozenHead(torch.autograd.Function):
    """A head without gradient and one target a token: ∂l/∂h is one row a token, made while its logits are there.

    The backward scales these rows, so no logits are computed twice: 4 N H V operations where _AnyHead needs 6 N H V.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ask = arguments
        inputs = Inputs(*tensors)
        outputs = _outputs(inputs, ask)
        hidden_TH, weight_VH, rows_N = inputs.hidden_TH, inputs.weight_VH, inputs.rows_N
        slope_NH = hidden_TH.new_empty(len(rows_N), hidden_TH.shape[1]) if ctx.needs_input_grad[0] else None
        for chunk in _chunks(inputs, ask):
            _write(outputs, chunk, ask)
            if slope_NH is not None:
                ones_C1 = torch.ones_like(chunk.scored.sum_C1)
                dlogits_CV = _dlogits(chunk, ones_C1, None, ask, weight_VH.dtype)
                slope_NH[chunk.place] = _product(dlogits_CV, weight_VH).to(slope_NH.dtype)
        ctx.save_for_backward(slope_NH, rows_N)
        ctx.shape = hidden_TH.shape
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope_NH, rows_N = ctx.saved_tensors
        dhidden_NH = torch.mul(slope_NH, grads[0], out=torch.empty_like(slope_NH))  # no float32 in between on CUDA
        return slope_NH.new_zeros(ctx.shape).index_copy_(0, rows_N, dhidden_NH), *[None] * 6


class _AnyHead(torch.autograd.Function):
    """Saves its inputs; the backward computes and scores the logits of each chunk again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ask = arguments
        inputs = Inputs(*tensors)
        outputs = _outputs(inputs, ask)
        for chunk in _chunks(inputs, ask):
            _write(outputs, chunk, ask)
        ctx.save_for_backward(*inputs)
        ctx.ask = ask
        ctx.mark_non_differentiable(*outputs[1 if ask.entropy != "differentiable" else 2 :])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = Inputs(*ctx.saved_tensors)
        hidden_TH, weight_VH, xa_TR, b_VR, _, targets_NK = ctx.saved_tensors
        ask = ctx.ask._replace(top_k=0)
        dlogprobs_NK = grads[0].masked_fill(targets_NK == IGNORED, 0.0)
        dentropy_N1 = grads[1].unsqueeze(1) if ask.entropy == "differentiable" else None
        needs_hidden, needs_weight, needs_xa, needs_b, *_ = ctx.needs_input_grad
        dhidden_TH = torch.zeros_like(hidden_TH) if needs_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        dxa_TR = torch.zeros_like(xa_TR) if needs_xa else None
        db_VR = torch.zeros_like(b_VR, dtype=torch.float32) if needs_b else None
        for chunk in _chunks(inputs, ask):
            dlogprobs_CK, dentropy_C1 = dlogprobs_NK[chunk.place], _rows(dentropy_N1, chunk.place)
            dlogits_CV = _dlogits(chunk, dlogprobs_CK, dentropy_C1, ask, weight_VH.dtype)
            if dhidden_TH is not None:
                dhidden_TH.index_copy_(0, chunk.rows_C, _product(dlogits_CV, weight_VH).to(dhidden_TH.dtype))
            if dweight_VH is not None:
                dweight_VH += _product(dlogits_CV.T, chunk.hidden_CH)
            if dxa_TR is not None:
                dxa_TR.index_copy_(0, chunk.rows_C, _product(dlogits_CV, b_VR).to(dxa_TR.dtype))
            if db_VR is not None:
                db_VR += _product(dlogits_CV.T, xa_TR[chunk.rows_C])
        return (
            dhidden_TH,
            None if dweight_VH is None else dweight_VH.to(weight_VH.dtype),
            dxa_TR,
            None if db_VR is None else db_VR.to(b_VR.dtype),
            *[None] * 3,
        )


def _outputs(inputs: Inputs, ask: Ask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, entropy, those of the most likely and their ids, still to be written."""
    num_rows, device = len(inputs.rows_N), inputs.hidden_TH.device
    return (
        torch.empty(inputs.targets_NK.shape, device=device),
        torch.empty(num_rows if ask.entropy else 0, device=device),
        torch.empty(num_rows, ask.top_k, device=device),
        torch.empty(num_rows, ask.top_k, device=device, dtype=torch.int64),
    )


def _write(outputs: tuple[Tensor, Tensor, Tensor, Tensor], chunk: Chunk, ask: Ask) -> None:
    logprobs_NK, entropy_N, top_NJ, ids_NJ = outputs
    scored = chunk.scored
    logprobs_NK[chunk.place] = scored.logprobs_CK
    if scored.entropy_C1 is not None:
        entropy_N[chunk.place] = scored.entropy_C1.squeeze(1)
    top_NJ[chunk.place] = chunk.top_logits_CJ / ask.temperature - scored.max_C1 - scored.sum_C1.log()
    ids_NJ[chunk.place] = chunk.top_ids_CJ


def _chunks(inputs: Inputs, ask: Ask) -> Iterator[Chunk]:
    """Every chunk with its logits, scored; each overwrites the logits of the one before."""
    hidden_TH, weight_VH, xa_TR, b_VR, rows_N, targets_NK = inputs
    workspace_CV = hidden_TH.new_empty(min(ask.chunk_tokens, len(rows_N)), len(weight_VH), dtype=torch.float32)
    for start in range(0, len(rows_N), ask.chunk_tokens):
        place = slice(start, start + ask.chunk_tokens)
        rows_C, targets_CK = rows_N[place], targets_NK[place]
        hidden_CH = hidden_TH.index_select(0, rows_C)
        logits_CV = _product(hidden_CH, weight_VH.T, out=workspace_CV[: len(rows_C)])
        if xa_TR is not None and b_VR is not None:
            logits_CV.addmm_(xa_TR[rows_C].float(), b_VR.float().T)
        top_logits_CJ, top_ids_CJ = logits_CV.topk(ask.top_k)
        scored = ask.steps.score(logits_CV, targets_CK, ask.temperature, entropy=ask.entropy is not None)
        yield Chunk(place, rows_C, hidden_CH, logits_CV, targets_CK, scored, top_logits_CJ, top_ids_CJ)


def _dlogits(
    chunk: Chunk,
    dlogprobs_CK: Tensor,
    dentropy_C1: Tensor | None,
    ask: Ask,
    dtype: torch.dtype,
) -> Tensor:
    return ask.steps.dlogits(
        chunk.logits_CV, chunk.targets_CK, chunk.scored, dlogprobs_CK, dentropy_C1, ask.temperature, dtype
    )


def _rows(x: Tensor | None, place: slice) -> Tensor | None:
    return None if x is None else x[place]


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in float32; on CUDA from half-precision operands without upcasting them."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)
