"""Scores a chunk of logits, and turns it into their gradient in place: one program a row, no atomics.

C: tokens of a chunk; K: targets a token; V: vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xorl_kernels.logprobs import reference
from xorl_kernels.logprobs.reference import Scored

IGNORED = tl.constexpr(reference.IGNORED)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a maximum to begin with, from which −inf can be subtracted
COMPILE_OPTIONS = dict(num_warps=8, num_stages=1)


def score(logits_CV: Tensor, targets_CK: Tensor, temperature: float, *, entropy: bool) -> Scored:
    """`reference.score` in one reading of the logits, which stay. A target outside the vocabulary scores NaN."""
    (num_rows, num_cols), num_targets = logits_CV.shape, targets_CK.shape[1]
    _check(logits_CV, num_rows, targets_CK=targets_CK)
    logprobs_CK = logits_CV.new_empty(num_rows, num_targets)
    max_C1, sum_C1, entropy_C1 = (logits_CV.new_empty(num_rows, 1) for _ in range(3))
    _launch(
        _score,
        num_rows,
        logits_CV,
        targets_CK.contiguous(),
        logprobs_CK,
        max_C1,
        sum_C1,
        entropy_C1,
        1 / temperature,
        **_score_constants(num_cols, num_targets, entropy),
    )
    return Scored(logprobs_CK, max_C1, sum_C1, entropy_C1 if entropy else None)


def dlogits(
    logits_CV: Tensor,
    targets_CK: Tensor,
    scored: Scored,
    dlogprobs_CK: Tensor,
    dentropy_C1: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.dlogits` in one reading and one writing.

    The result begins each row where its logits began: a bfloat16 row fills the first half of that memory.
    """
    (num_rows, num_cols), num_targets = logits_CV.shape, targets_CK.shape[1]
    _check(logits_CV, num_rows, targets_CK=targets_CK, dlogprobs_CK=dlogprobs_CK)
    dlogits_CV = logits_CV.view(dtype)[:, :num_cols]
    differentiate_entropy = dentropy_C1 is not None
    _launch(
        _dlogits,
        num_rows,
        logits_CV,
        dlogits_CV,
        targets_CK.contiguous(),
        dlogprobs_CK.contiguous(),
        scored.max_C1,
        scored.sum_C1,
        scored.entropy_C1 if differentiate_entropy else scored.sum_C1,
        dentropy_C1.contiguous() if differentiate_entropy else scored.sum_C1,
        1 / temperature,
        **_dlogits_constants(num_cols, num_targets, dtype, differentiate_entropy),
    )
    return dlogits_CV


def production() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Name, function, types of arguments, constants and options of the launches that real models make."""
    types = dict.fromkeys((*_score.arg_names, *_dlogits.arg_names), "*fp32")
    types |= {"dlogits_ptr": "*bf16", "targets_ptr": "*i64", "scale": "fp32"}
    for model, num_cols in (("Qwen3", 151_936), ("Llama-3", 128_256)):
        for num_targets, entropy in ((1, False), (1, True), (8, True)):
            words = f"{model}, {num_targets} target(s)" + ", entropy" * entropy
            for function, constants in (
                (_score, _score_constants(num_cols, num_targets, entropy)),
                (_dlogits, _dlogits_constants(num_cols, num_targets, torch.bfloat16, entropy)),
            ):
                signature = {name: types[name] for name in function.arg_names if name not in constants}
                yield f"{function.__name__.lstrip('_')}, {words}", function, signature, constants, COMPILE_OPTIONS


def _launch(function: Any, num_rows: int, *arguments: Any, **constants: Any) -> None:
    function[(num_rows,)](*arguments, **constants, **COMPILE_OPTIONS)


def _check(logits_CV: Tensor, num_rows: int, **per_target: Tensor) -> None:
    if logits_CV.dtype != torch.float32 or not logits_CV.is_contiguous():
        raise ValueError(f"logits must be contiguous float32, got {logits_CV.dtype}, strides {logits_CV.stride()}")
    for name, x_CK in per_target.items():
        if x_CK.dim() != 2 or len(x_CK) != num_rows:
            raise ValueError(f"{name} must be [{num_rows}, K], got {list(x_CK.shape)}")


def _score_constants(num_cols: int, num_targets: int, entropy: bool) -> dict[str, Any]:
    """The vocabulary is one of them: it is the model's, and its divisors make for wide loads."""
    return dict(
        NUM_COLS=num_cols,
        NUM_TARGETS=num_targets,
        TARGETS=triton.next_power_of_2(num_targets),
        ENTROPY=entropy,
        COLS=_tile(num_cols),
    )


def _dlogits_constants(num_cols: int, num_targets: int, dtype: torch.dtype, entropy: bool) -> dict[str, Any]:
    return dict(
        NUM_COLS=num_cols,
        OUT_STRIDE=num_cols * (4 // dtype.itemsize),
        NUM_TARGETS=num_targets,
        ENTROPY=entropy,
        COLS=_tile(num_cols),
    )


def _tile(num_cols: int) -> int:
    """Columns at a time: 16 a thread."""
    return min(4096, triton.next_power_of_2(num_cols))


@triton.jit
def _score(
    logits_ptr,
    targets_ptr,
    logprobs_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    scale,
    NUM_COLS: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    TARGETS: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLS: tl.constexpr,
):
    """The sums are relative to the maximum so far, and follow when it rises: Milakov and Gimelshein 2018."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * NUM_COLS
    maximum = LOWEST
    sums = tl.zeros([COLS], tl.float32)  # Σ exp(z − maximum)
    means = tl.zeros([COLS], tl.float32)  # Σ exp(z − maximum) (z − maximum)
    for start in range(0, NUM_COLS, COLS):
        cols = start + tl.arange(0, COLS)
        z = tl.load(logits_ptr + cols, mask=cols < NUM_COLS, other=float("-inf")) * scale
        risen = tl.maximum(maximum, tl.max(z, axis=0))
        shrink = tl.exp(maximum - risen)
        terms = tl.exp(z - risen)
        if ENTROPY:
            lowered = shrink * (means + sums * (maximum - risen))
            means = lowered + tl.where(terms > 0, terms * (z - risen), 0.0)
        sums = sums * shrink + terms
        maximum = risen
    total = tl.sum(sums, axis=0)
    log_total = tl.log(total)
    tl.store(max_ptr + row, maximum)
    tl.store(sum_ptr + row, total)
    if ENTROPY:
        tl.store(entropy_ptr + row, log_total - tl.div_rn(tl.sum(means, axis=0), total))
    k = tl.arange(0, TARGETS)
    target_mask = k < NUM_TARGETS
    targets = tl.load(targets_ptr + row * NUM_TARGETS + k, mask=target_mask, other=IGNORED)
    col_mask = (targets >= 0) & (targets < NUM_COLS)
    z = tl.load(logits_ptr + targets, mask=col_mask, other=float("nan")) * scale
    logprobs = tl.where(targets == IGNORED, 0.0, z - maximum - log_total)
    tl.store(logprobs_ptr + row * NUM_TARGETS + k, logprobs, mask=target_mask)


@triton.jit
def _dlogits(
    logits_ptr,
    dlogits_ptr,
    targets_ptr,
    dlogprobs_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    dentropy_ptr,
    scale,
    NUM_COLS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * NUM_COLS
    dlogits_ptr += row * OUT_STRIDE
    targets_ptr += row * NUM_TARGETS
    dlogprobs_ptr += row * NUM_TARGETS
    maximum = tl.load(max_ptr + row)
    total = tl.load(sum_ptr + row)
    inverse, log_total = tl.div_rn(1.0, total), tl.log(total)
    dlogprobs = 0.0
    for k in range(NUM_TARGETS):
        dlogprobs += tl.load(dlogprobs_ptr + k)
    entropy, dentropy = 0.0, 0.0
    if ENTROPY:
        entropy, dentropy = tl.load(entropy_ptr + row), tl.load(dentropy_ptr + row)
    for start in range(0, NUM_COLS, COLS):
        cols = start + tl.arange(0, COLS)
        col_mask = cols < NUM_COLS
        shifted = tl.load(logits_ptr + cols, mask=col_mask, other=0.0) * scale - maximum
        p = tl.exp(shifted) * inverse
        dz = -dlogprobs * p
        if ENTROPY:
            dz -= dentropy * tl.where(p > 0, p * (shifted - log_total + entropy), p)
        for k in range(NUM_TARGETS):
            dz += tl.where(cols == tl.load(targets_ptr + k), tl.load(dlogprobs_ptr + k), 0.0)
        # A narrower row is written over logits of this tile and earlier ones: every thread must have read its own.
        tl.debug_barrier()
        tl.store(dlogits_ptr + cols, (dz * scale).to(dlogits_ptr.dtype.element_ty), mask=col_mask)
