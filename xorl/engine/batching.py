"""Packs the datums of many requests into batches of a token budget.

N: datums; T: tokens; K: candidate targets a position.
"""

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xorl.engine.commands import Datums, Forward, ForwardBackward
from xorl.engine.losses import LossInputs
from xorl.types import IGNORED_TARGET, AnyLoss


class Cohort(NamedTuple):
    """Requests with one loss and inputs of one form, their columns laid end to end; tensors on the CPU.

    Attributes:
        members: which of the step's requests.
        bounds: [members + 1], where each request begins among the tokens.
        owners: the request of each datum.
        lengths: of each datum.
        backward: whether their gradient is wanted.
    """

    backward: bool

    loss: AnyLoss
    members: list[int]
    bounds: list[int]
    owners: list[int]
    lengths: list[int]
    tokens_T: Tensor  # int64
    inputs: LossInputs

    def of(self, member: int) -> LossInputs:
        """The inputs of one request, by its place among the members."""
        start, stop = self.bounds[member : member + 2]
        return LossInputs(
            targets_TK=self.inputs.targets_TK[start:stop],
            offsets=[offset - start for offset in self.inputs.offsets if start <= offset <= stop],
            arrays={name: array[start:stop] for name, array in self.inputs.arrays.items()},
        )


class Run(NamedTuple):
    """Consecutive tokens of a batch that belong to one of the step's requests."""

    request: int
    start: int
    stop: int


class Portion(NamedTuple):
    """What a batch has of one cohort: the tokens start..stop of the batch, whole datums.

    Attributes:
        cohort: which of the step's.
        runs: by request; their places are those in the batch.
        positions_T: where each token stands in the cohort.
        targets_TK: on the CPU; `inputs` has them on the device.
    """

    cohort: int
    loss: AnyLoss
    start: int
    stop: int
    runs: list[Run]
    positions_T: Tensor
    targets_TK: Tensor
    inputs: LossInputs


class Batch(NamedTuple):
    """Whole datums that run together, laid end to end, a cohort after the other.

    Attributes:
        places_T: where each token stands in its datum.
        requests_T: the request of each token.
        backward: whether its gradient is wanted.
    """

    backward: bool

    tokens_T: Tensor
    places_T: Tensor
    requests_T: Tensor
    lengths: list[int]
    portions: list[Portion]

    def on_device(self, copy: Callable[[Tensor], Tensor]) -> "Batch":
        portions = []
        for portion in self.portions:
            arrays = {name: copy(array) for name, array in portion.inputs.arrays.items()}
            inputs = LossInputs(copy(portion.targets_TK), portion.inputs.offsets, arrays)
            portions.append(portion._replace(inputs=inputs))
        tokens_T, places_T, requests_T = (copy(x) for x in (self.tokens_T, self.places_T, self.requests_T))
        return self._replace(tokens_T=tokens_T, places_T=places_T, requests_T=requests_T, portions=portions)


def cohorts(requests: Mapping[int, Forward | ForwardBackward]) -> list[Cohort]:
    """Sort requests, each under its number in the step, by what their losses need."""
    alike: dict[tuple[bool, AnyLoss, int, tuple[str, ...]], list[int]] = {}
    for number, request in requests.items():
        columns, backward = request.datums, isinstance(request, ForwardBackward)
        form = backward, request.loss, columns.num_targets, tuple(sorted(columns.loss_inputs))
        alike.setdefault(form, []).append(number)
    return [
        _cohort(backward, loss, {number: requests[number].datums for number in members})
        for (backward, loss, _, _), members in alike.items()
    ]


def _cohort(backward: bool, loss: AnyLoss, members: Mapping[int, Datums]) -> Cohort:
    columns = list(members.values())
    num_targets, names = columns[0].num_targets, columns[0].loss_inputs
    offsets, bounds, owners = [0], [0], []
    for number, each in members.items():
        own = np.frombuffer(each.offsets, np.int32)
        offsets += (own[1:] + bounds[-1]).tolist()
        owners += [number] * (len(own) - 1)
        bounds.append(offsets[-1])
    arrays = {name: _joined([each.loss_inputs[name] for each in columns], np.float32) for name in names}
    if "weights" in arrays:
        arrays["weights"] = arrays["weights"].view(-1, num_targets)
    targets_TK = _joined([each.targets for each in columns], np.int32).long().view(-1, num_targets)
    return Cohort(
        backward=backward,
        loss=loss,
        members=list(members),
        bounds=bounds,
        owners=owners,
        lengths=[stop - start for start, stop in itertools.pairwise(offsets)],
        tokens_T=_joined([each.tokens for each in columns], np.int32).long(),
        inputs=LossInputs(targets_TK, offsets, arrays),
    )


def _joined(buffers: Sequence[bytes], dtype: type) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray().join(buffers), dtype))  # torch wants writable memory


class Share(NamedTuple):
    """Which part of a step is whose: `rank` of `num_ranks`. With `in_step`, all have equally many batches."""

    rank: int = 0
    num_ranks: int = 1
    in_step: bool = False


ALL = Share()


def pack(step: Sequence[Cohort], max_tokens: int, share: Share = ALL) -> tuple[list[Batch], int]:
    """Cut the datums of a step's cohorts into batches of at most `max_tokens`; a longer one has a batch of its own.

    Returns:
        The batches of one rank, and the tokens of the largest that any rank has.
    """
    batches, largest = [], 0
    for backward in (True, False):
        datums = [
            (c, n) for c, cohort in enumerate(step) if cohort.backward == backward for n in range(len(cohort.lengths))
        ]
        lengths = [step[c].lengths[n] for c, n in datums]
        plans = planned(lengths, max_tokens, share.num_ranks)
        largest = max([largest, *(sum(lengths[index] for index in batch) for plan in plans for batch in plan)])
        if share.in_step and datums:
            idle = max(map(len, plans)) - len(plans[share.rank])
            shortest = datums[lengths.index(min(lengths))]
            batches += [_idle_batch(step, *shortest, backward)] * idle
        for chosen in plans[share.rank]:
            members: dict[int, list[int]] = {}
            for c, n in (datums[index] for index in chosen):
                members.setdefault(c, []).append(n)
            batches.append(_batch(step, members, backward))
    return batches, largest


def planned(lengths: Sequence[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """The batches of each rank, as indices of `lengths`."""
    return [
        [[part[i] for i in batch] for batch in first_fit([lengths[index] for index in part], max_tokens)]
        for part in balanced(lengths, num_ranks)
    ]


def _idle_batch(step: Sequence[Cohort], c: int, n: int, backward: bool) -> Batch:
    """A datum with all targets ignored: it passes through the network and leaves nothing, its results are zeros."""
    batch = _batch(step, {c: [n]}, backward)
    (portion,) = batch.portions
    ignored_TK = torch.full_like(portion.targets_TK, IGNORED_TARGET)
    inputs = LossInputs(ignored_TK, portion.inputs.offsets, portion.inputs.arrays)
    return batch._replace(portions=[portion._replace(targets_TK=ignored_TK, inputs=inputs)])


def _batch(step: Sequence[Cohort], members: Mapping[int, Sequence[int]], backward: bool) -> Batch:
    """The datums given of each cohort; those of a request side by side, the longest first."""
    tokens, lengths, portions = [], [], []
    for c, given in members.items():
        datums = sorted(given, key=step[c].owners.__getitem__)  # stable, and `given` has the longest first
        portions.append(_portion(step, c, datums, portions[-1].stop if portions else 0))
        tokens.append(step[c].tokens_T[portions[-1].positions_T])
        lengths += [step[c].lengths[n] for n in datums]
    runs = [run for portion in portions for run in portion.runs]
    return Batch(
        backward=backward,
        tokens_T=torch.cat(tokens),
        places_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        requests_T=torch.from_numpy(np.repeat([run.request for run in runs], [run.stop - run.start for run in runs])),
        lengths=lengths,
        portions=portions,
    )


def _portion(step: Sequence[Cohort], c: int, datums: Sequence[int], start: int) -> Portion:
    """Datums of a cohort, from place `start` of a batch on."""
    cohort = step[c]
    offsets = cohort.inputs.offsets
    positions_T = torch.from_numpy(np.concatenate([np.arange(offsets[n], offsets[n + 1]) for n in datums]))
    runs: list[Run] = []
    for request, own in itertools.groupby(datums, key=cohort.owners.__getitem__):
        first = runs[-1].stop if runs else start
        runs.append(Run(request, first, first + sum(cohort.lengths[n] for n in own)))
    targets_TK = cohort.inputs.targets_TK[positions_T]
    arrays = {name: array[positions_T] for name, array in cohort.inputs.arrays.items()}
    inputs = LossInputs(targets_TK, [0, *itertools.accumulate(cohort.lengths[n] for n in datums)], arrays)
    return Portion(c, cohort.loss, start, runs[-1].stop, runs, positions_T, targets_TK, inputs)


def balanced(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of `lengths` in parts of about equal sums: the longest first, each to the part with least so far.

    No part exceeds another by more than its own shortest length. Source: Graham 1969 (longest processing time first).
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, part = loads[0]
        parts[part].append(index)
        heapq.heapreplace(loads, (load + lengths[index], part))
    return parts


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
