"""Draws follow the distribution they are told to follow."""

import torch

from xorl.sampler.sampling import Sampling, draw, uniform

LOGITS = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]))


def frequencies(sampling: Sampling, num_draws: int = 20_000) -> list[float]:
    rows = [sampling] * num_draws
    drawn = draw(LOGITS.expand(num_draws, -1), rows, [uniform(1, idx % 7, idx) for idx in range(num_draws)])
    return (torch.bincount(torch.tensor(drawn.tokens), minlength=5) / num_draws).tolist()


def near(found: list[float], wanted: list[float]) -> bool:
    total = sum(wanted)
    return all(abs(a - b / total) < 0.015 for a, b in zip(found, wanted, strict=True))


def test_frequencies_are_the_probabilities() -> None:
    assert near(frequencies(Sampling()), [0.4, 0.3, 0.2, 0.06, 0.04])
    assert near(frequencies(Sampling(temperature=0.5)), [0.16, 0.09, 0.04, 0.0036, 0.0016])


def test_filters_cut_the_tail() -> None:
    assert near(frequencies(Sampling(top_k=2)), [0.4, 0.3, 0, 0, 0])
    assert near(frequencies(Sampling(top_p=0.8)), [0.4, 0.3, 0.2, 0, 0])
    assert near(frequencies(Sampling(min_p=0.14)), [0.4, 0.3, 0.2, 0.06, 0])
    assert frequencies(Sampling(temperature=0)) == [1, 0, 0, 0, 0]
    assert frequencies(Sampling(top_k=1)) == [1, 0, 0, 0, 0]


def test_every_token_can_be_the_last_one_drawn() -> None:
    drawn = draw(LOGITS.expand(2, -1), [Sampling()] * 2, [0.0, 1 - 2.0**-52])
    assert drawn.tokens == [0, 4]


def test_a_row_without_probabilities_has_no_logprob() -> None:
    drawn = draw(torch.full((1, 5), float("nan")), [Sampling()], [0.5])
    assert drawn.logprobs[0] != drawn.logprobs[0]
