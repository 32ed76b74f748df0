"""Packing covers every datum once, within the budget."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import datums
from xorl.engine.batching import first_fit, pack, unpack

lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths_lists, st.integers(1, 100))
def test_bins_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = first_fit(lengths, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= budget or len(members) == 1


@given(lengths_lists, st.integers(1, 100))
def test_batches_carry_every_token_back_to_its_place(lengths: list[int], budget: int) -> None:
    sequences = [[100 * i + j for j in range(length + 1)] for i, length in enumerate(lengths)]
    weights = [[float(token) for token in sequence[1:]] for sequence in sequences]
    request = unpack(datums(sequences, weights=weights))
    tokens = torch.full_like(request.tokens_T, -1)
    for batch in pack(request, budget):
        tokens[batch.positions_T] = batch.tokens_T
        assert torch.equal(batch.targets_TK.float(), batch.arrays["weights"])
        assert batch.offsets[-1] == len(batch.tokens_T)
    assert torch.equal(tokens, request.tokens_T)
