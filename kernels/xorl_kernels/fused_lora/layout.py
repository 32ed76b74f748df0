"""Says which adapter's ranks act on which tokens.

T: tokens; I, O: inputs and outputs of the projections side by side; P: projections; R: width of s = scale · x Aᵀ, in
which the ranks of an adapter's projections lie side by side too.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

RANK_ALIGNMENT = 8


class Pair(NamedTuple):
    """An adapter's factors for one projection: float32 leaves, whose .grad the backward adds to by itself."""

    a_RI: Tensor
    b_OR: Tensor


class Segment(NamedTuple):
    """Tokens start..stop of a batch and the adapter that acts on them; None where it leaves a projection alone."""

    start: int
    stop: int
    pairs: tuple[Pair | None, ...]
    scale: float


class Span(NamedTuple):
    """A segment, its adapter by number."""

    start: int
    stop: int
    adapter: int
    scale: float


class Layout:
    """The segments of a batch, for projections of given sizes.

    Attributes:
        num_tokens: T.
        sizes: outputs of each projection.
        outputs: [P + 1], where each projection begins among all outputs.
        adapters: each once, however many segments it has, since its gradient is one sum.
        columns: for each adapter and projection, where its ranks lie in s; each begins at a multiple of 8, for wide
            loads, and zeros fill what is between.
        spans: in ascending order; empty segments are left out.
        num_ranks: R.
    """

    def __init__(self, segments: Sequence[Segment], sizes: Sequence[int], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.sizes = tuple(sizes)
        self.outputs = (0, *itertools.accumulate(self.sizes))
        numbers: dict[tuple[int, ...], int] = {}
        self.adapters: list[tuple[Pair | None, ...]] = []
        self.spans: list[Span] = []
        done = 0
        for start, stop, pairs, scale in segments:
            if not done <= start <= stop <= num_tokens:
                raise ValueError(f"segment {start}..{stop} overlaps its neighbour or leaves the {num_tokens} tokens")
            done = stop
            if start == stop or not any(pairs):
                continue
            identity = tuple(0 if tensor is None else id(tensor) for pair in pairs for tensor in pair or (None, None))
            if identity not in numbers:
                numbers[identity] = len(self.adapters)
                self.adapters.append(pairs)
            self.spans.append(Span(start, stop, numbers[identity], scale))
        self.columns = [_columns(pairs) for pairs in self.adapters]
        self.num_ranks = max((padded(columns[-1].stop) for columns in self.columns), default=0)

    @cached_property
    def runs(self) -> list[list[Span]]:
        """Neighbouring spans of one length and scale; their adapters differ, but have ranks in the same columns."""
        runs: list[list[Span]] = []
        for span in self.spans:
            if not (runs and self._continues(runs[-1], span)):
                runs.append([])
            runs[-1].append(span)
        return runs

    def _continues(self, run: Sequence[Span], span: Span) -> bool:
        last = run[-1]
        return (
            span.start == last.stop
            and span.stop - span.start == last.stop - last.start
            and span.scale == last.scale
            and self.columns[span.adapter] == self.columns[last.adapter]
            and all(span.adapter != other.adapter for other in run)
        )

    @property
    def factors(self) -> list[Tensor]:
        """Every A and B once."""
        return [factor for pairs in self.adapters for pair in pairs if pair is not None for factor in pair]


def _columns(pairs: Sequence[Pair | None]) -> tuple[slice, ...]:
    columns, first = [], 0
    for pair in pairs:
        columns.append(slice(first, first + (0 if pair is None else len(pair.a_RI))))
        first = padded(columns[-1].stop)
    return tuple(columns)


def padded(num_ranks: int) -> int:
    return -(-num_ranks // RANK_ALIGNMENT) * RANK_ALIGNMENT


def gradient_of(factor: Tensor) -> Tensor | None:
    """Where to add the factor's gradient; made if it isn't there, None for a factor that is not trained."""
    if not factor.requires_grad:
        return None
    if factor.grad is None:
        factor.grad = torch.zeros_like(factor)
    return factor.grad
