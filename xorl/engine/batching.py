"""Packs datums into batches of a token budget and puts the outputs back in request order.

N: datums of a request; T: its tokens; K: candidate targets a position.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xorl.engine.commands import Datums


class Request(NamedTuple):
    """A request's columns as tensors on the CPU, still in request order."""

    tokens_T: Tensor  # int64
    targets_TK: Tensor  # int64
    arrays: Mapping[str, Tensor]  # float32 [T], weights [T, K]
    offsets: list[int]  # [N + 1], where each datum begins

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in itertools.pairwise(self.offsets)]


class Batch(NamedTuple):
    """Whole datums that run together, laid end to end."""

    tokens_T: Tensor
    targets_TK: Tensor
    arrays: Mapping[str, Tensor]
    lengths: list[int]
    positions_T: Tensor  # where each token of the batch stands in the request

    @property
    def offsets(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]

    def to(self, device: torch.device) -> "Batch":
        arrays = {name: array.to(device, non_blocking=True) for name, array in self.arrays.items()}
        tokens_T, targets_TK = (x.to(device, non_blocking=True) for x in (self.tokens_T, self.targets_TK))
        return self._replace(tokens_T=tokens_T, targets_TK=targets_TK, arrays=arrays)


def unpack(datums: Datums) -> Request:
    """View a command's buffers as tensors."""
    num_targets = datums.num_targets
    arrays = {name: torch.from_numpy(_array(data, np.float32)) for name, data in datums.loss_inputs.items()}
    if "weights" in arrays:
        arrays["weights"] = arrays["weights"].view(-1, num_targets)
    return Request(
        tokens_T=torch.from_numpy(_array(datums.tokens, np.int32)).long(),
        targets_TK=torch.from_numpy(_array(datums.targets, np.int32)).long().view(-1, num_targets),
        arrays=arrays,
        offsets=_array(datums.offsets, np.int32).tolist(),
    )


def _array(data: bytes, dtype: type) -> np.ndarray:
    return np.frombuffer(bytearray(data), dtype=dtype)  # torch wants writable memory


def pack(request: Request, max_tokens: int) -> Iterator[Batch]:
    """Cut a request into batches of at most `max_tokens`; a longer datum has a batch of its own."""
    starts, lengths = request.offsets, request.lengths
    for members in first_fit(lengths, max_tokens):
        positions_T = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])
        yield Batch(
            tokens_T=request.tokens_T[positions_T],
            targets_TK=request.targets_TK[positions_T],
            arrays={name: array[positions_T] for name, array in request.arrays.items()},
            lengths=[lengths[i] for i in members],
            positions_T=positions_T,
        )


def first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing: bins of indices whose lengths sum to at most `max_tokens`, each bin longest first.

    Equal lengths thus lie side by side, which attention runs as one batch.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((b for b, room in enumerate(free) if room >= lengths[index]), None)
        if fitting is None:
            bins.append([index])
            free.append(max_tokens - lengths[index])
        else:
            bins[fitting].append(index)
            free[fitting] -= lengths[index]
    return bins
