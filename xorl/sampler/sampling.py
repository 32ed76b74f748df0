"""Turns logits into tokens; pure. B: rows; V: vocabulary; K: top entries."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Sampling(msgspec.Struct, frozen=True):
    """How one row's tokens are drawn. Temperature 0 takes the likeliest; top_k -1 keeps the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def filters(self) -> bool:
        return not self.greedy and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)


class Draw(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    logprobs_BV: Tensor


def draw(logits_BV: Tensor, rows: Sequence[Sampling], uniforms: Sequence[float]) -> Draw:
    """Draw one token a row, by inverting the row's cumulative distribution at its uniform number.

    Args:
        logits_BV: float32.
        uniforms: in [0, 1); they alone decide, so a row's draw does not depend on the others.

    Returns:
        tokens, and their log-probabilities under softmax(logits / temperature) over the whole vocabulary, before
        top_k, top_p and min_p; a greedy row's have temperature 1. SGLang reports the same unless told otherwise.
    """
    if any(row.temperature != 1.0 for row in rows):
        scale_B = logits_BV.new_tensor([1.0 if row.greedy else row.temperature for row in rows])
        logits_BV = logits_BV / scale_B[:, None]
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    tokens_B1 = _choose(logprobs_BV, rows, uniforms)
    both = torch.cat([tokens_B1.double(), logprobs_BV.gather(1, tokens_B1).double()], dim=1).T.tolist()
    return Draw([int(token) for token in both[0]], both[1], logprobs_BV)


def uniform(seed: int, sample_idx: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position` of the given sample of a request."""
    return _mix(_mix(_mix(seed & _MASK64) + sample_idx) + position) * 2.0**-64 * (1 - 2.0**-52)


def top(logprobs_BV: Tensor, num_top: int) -> tuple[list[list[float]], list[list[int]]]:
    """Values and token ids of the likeliest `num_top` of each row."""
    values_BK, tokens_BK = logprobs_BV.topk(num_top, dim=-1)
    return values_BK.tolist(), tokens_BK.tolist()


def _choose(logprobs_BV: Tensor, rows: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    greedy = [row.greedy for row in rows]
    likeliest_B1 = logprobs_BV.argmax(dim=-1, keepdim=True) if any(greedy) else None
    if likeliest_B1 is not None and all(greedy):
        return likeliest_B1
    probs_BV = logprobs_BV.exp()
    picky = [row_idx for row_idx, row in enumerate(rows) if row.filters]
    if picky:
        probs_BV[picky] = _keep_likely(probs_BV[picky], [rows[row_idx] for row_idx in picky])
    cumulative_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    uniforms_B1 = torch.tensor(uniforms, dtype=torch.float64, device=logprobs_BV.device)[:, None]
    # right=True: the first token whose cumulative probability exceeds the target, never one of probability 0
    drawn_B1 = torch.searchsorted(cumulative_BV, uniforms_B1 * cumulative_BV[:, -1:], right=True)
    drawn_B1 = drawn_B1.clamp_(max=logprobs_BV.shape[1] - 1)  # beyond the end only where the logits are NaN
    if likeliest_B1 is None:
        return drawn_B1
    return torch.where(torch.tensor(greedy, device=drawn_B1.device)[:, None], likeliest_B1, drawn_B1)


def _keep_likely(probs_BV: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """Set to zero what top_k, top_p or min_p exclude; the likeliest token always stays."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    num_tokens = probs_BV.shape[1]
    top_k_B1 = order_BV.new_tensor([row.top_k if row.top_k > 0 else num_tokens for row in rows])[:, None]
    top_p_B1 = sorted_BV.new_tensor([row.top_p for row in rows])[:, None]
    min_p_B1 = sorted_BV.new_tensor([row.min_p for row in rows])[:, None]
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    ranks_V = torch.arange(num_tokens, device=probs_BV.device)
    keep_BV = (before_BV <= top_p_B1) | (top_p_B1 >= 1.0)
    keep_BV &= (ranks_V < top_k_B1) & (sorted_BV >= min_p_B1 * sorted_BV[:, :1])
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, sorted_BV * keep_BV)


def _mix(x: int) -> int:
    """One step of splitmix64, a counter-based generator (Steele et al. 2014)."""
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
