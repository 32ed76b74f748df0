"""Packing covers every datum once, within the budget."""

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import datums
from xorl.engine.batching import cohorts, first_fit, pack
from xorl.engine.commands import Datums, Forward, ForwardBackward
from xorl.types import CausalLmLoss, CrossEntropy

Kind = Callable[[Datums], Forward | ForwardBackward]


def kind(command: type, **more: object) -> Kind:
    return lambda data: command(model_id="m", datums=data, **more)


KINDS = [
    kind(Forward, loss=CrossEntropy()),
    kind(ForwardBackward, loss=CrossEntropy(), token_mean=True),
    kind(ForwardBackward, loss=CausalLmLoss(), token_mean=False),
]

lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths_lists, st.integers(1, 100))
def test_bins_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = first_fit(lengths, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= budget or len(members) == 1


@given(st.lists(st.tuples(lengths_lists, st.sampled_from(KINDS)), min_size=1, max_size=6), st.integers(1, 100))
def test_batches_carry_every_token_back_to_its_place(requests: list[tuple[list[int], Kind]], budget: int) -> None:
    """Whatever requests share a batch: every token once, with its own inputs, request and place in its datum."""
    first, commands = 0, {}
    for number, (lengths, kind) in enumerate(requests):
        sequences = [list(range(first := first + 100, first + length + 1)) for length in lengths]
        commands[number] = kind(datums(sequences, weights=[sequence[1:] for sequence in sequences]))
    step = cohorts(commands)
    assert sorted(number for cohort in step for number in cohort.members) == list(commands)
    found = [torch.full_like(cohort.tokens_T, -1) for cohort in step]
    for batch in pack(step, budget)[0]:
        assert len(batch.tokens_T) <= budget or len(batch.lengths) == 1
        assert torch.equal(batch.tokens_T % 100, batch.places_T)
        for portion in batch.portions:
            place, cohort = slice(portion.start, portion.stop), step[portion.cohort]
            assert batch.backward == cohort.backward
            found[portion.cohort][portion.positions_T] = batch.tokens_T[place]
            assert torch.equal(portion.inputs.arrays["weights"], portion.targets_TK.float())
            assert torch.equal(portion.targets_TK[:, 0], batch.tokens_T[place] + 1)
            for run in portion.runs:
                assert set(batch.requests_T[run.start : run.stop].tolist()) == {run.request}
                assert run.request in cohort.members
        assert [run.stop for portion in batch.portions for run in portion.runs][-1] == len(batch.tokens_T)
    for cohort, tokens in zip(step, found, strict=True):
        assert torch.equal(tokens, cohort.tokens_T)
        for member, number in enumerate(cohort.members):
            given, own = commands[number].datums, cohort.of(member)
            assert own.targets_TK.int().numpy().tobytes() == given.targets
            assert np.array(own.offsets, np.int32).tobytes() == given.offsets


def test_requests_alike_share_one_loss() -> None:
    """A batch of many tenants with one loss costs its launches once."""
    one = datums([[1, 2, 3]])
    commands = {n: ForwardBackward(model_id=str(n), datums=one, loss=CrossEntropy(), token_mean=True) for n in range(9)}
    (batch,), _ = pack(cohorts(commands), 100)
    (portion,) = batch.portions
    assert [run.request for run in portion.runs] == list(range(9))
