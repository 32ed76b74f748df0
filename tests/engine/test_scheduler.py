"""Order within a model, fairness between models, and what shares a step."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xorl.engine.scheduler import Scheduler, Work

Item = tuple[str, int]  # model_id, number
MANY = 10**9

arrivals_lists = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 300), st.sampled_from(["forward", "optim_step", None]))
)


def filled(arrivals: list[tuple[str, int, str | None]], quantum: int = 50) -> Scheduler[Item]:
    scheduler: Scheduler[Item] = Scheduler(quantum)
    for number, (model_id, cost, shares) in enumerate(arrivals):
        scheduler.add(model_id, Work((model_id, number), cost, shares))
    return scheduler


def drain(scheduler: Scheduler[Item], budget: int = MANY, max_models: int = MANY) -> list[list[Item]]:
    return list(iter(lambda: scheduler.next(budget, max_models), []))


@given(arrivals_lists, st.integers(1, 100), st.integers(1, 400), st.integers(1, 3))
def test_everything_runs_once_and_each_model_in_order(
    arrivals: list[tuple[str, int, str | None]], quantum: int, budget: int, max_models: int
) -> None:
    scheduler = filled(arrivals, quantum)
    taken = list(itertools.chain(*drain(scheduler, budget, max_models)))
    for name in "abc":
        expected = [number for number, (model_id, *_) in enumerate(arrivals) if model_id == name]
        assert [number for model_id, number in taken if model_id == name] == expected
    assert len(taken) == len(arrivals)
    assert len(scheduler) == 0


@given(arrivals_lists, st.integers(1, 400), st.integers(1, 3))
def test_a_step_shares_one_thing_within_the_budget(
    arrivals: list[tuple[str, int, str | None]], budget: int, max_models: int
) -> None:
    for step in drain(filled(arrivals), budget, max_models):
        works = [arrivals[number] for _, number in step]
        assert len({shares for *_, shares in works}) == 1
        assert len(step) == 1 or works[0][2] is not None
        assert sum(cost for _, cost, _ in works) <= budget or len(step) == 1
        assert len({model_id for model_id, _ in step}) <= max_models


@given(arrivals_lists, arrivals_lists, st.integers(1, 400))
def test_the_same_arrivals_give_the_same_steps(
    early: list[tuple[str, int, str | None]], late: list[tuple[str, int, str | None]], budget: int
) -> None:
    runs = []
    for _ in range(2):
        scheduler = filled(early)
        steps = [scheduler.next(budget, MANY) for _ in range(3)]
        for number, (model_id, cost, shares) in enumerate(late):
            scheduler.add(model_id, Work((model_id, number), cost, shares))
        runs.append(steps + drain(scheduler, budget))
    assert runs[0] == runs[1]


def test_a_step_takes_what_there_is_of_all_models() -> None:
    scheduler = filled([(model_id, 10, "forward") for model_id in "aabbcc"])
    assert sorted(scheduler.next(MANY, MANY)) == [("a", 0), ("a", 1), ("b", 2), ("b", 3), ("c", 4), ("c", 5)]


def test_an_optim_step_holds_back_its_own_model_alone() -> None:
    arrivals = [("a", 10, "forward"), ("a", 1, "optim_step"), ("a", 10, "forward"), ("b", 10, "forward")]
    steps = drain(filled([*arrivals, ("b", 10, "forward")]))
    assert sorted(steps[0]) == [("a", 0), ("b", 3), ("b", 4)]
    assert steps[1:] == [[("a", 1)], [("a", 2)]]


@given(
    st.lists(st.integers(1, 50), min_size=40, max_size=60),
    st.lists(st.integers(1, 50), min_size=40, max_size=60),
    st.integers(1, 200),
)
def test_two_busy_models_get_equal_tokens(a: list[int], b: list[int], budget: int) -> None:
    costs = [("a", cost) for cost in a] + [("b", cost) for cost in b]
    scheduler = filled([(model_id, cost, "forward") for model_id, cost in costs])
    tokens: Counter[str] = Counter()
    num_taken: Counter[str] = Counter()
    while num_taken["a"] < len(a) and num_taken["b"] < len(b):  # neither queue is empty
        for model_id, number in scheduler.next(budget, MANY):
            tokens[model_id] += costs[number][1]
            num_taken[model_id] += 1
        if num_taken["a"] < len(a) and num_taken["b"] < len(b):
            assert abs(tokens["a"] - tokens["b"]) <= 2 * 50 + 50 + budget  # quantum and largest request, twice; a step


@pytest.mark.parametrize("weight", [0.25, 1.0, 4.0])
def test_tokens_follow_the_weights(weight: float) -> None:
    scheduler: Scheduler[str] = Scheduler(100, lambda model_id: weight if model_id == "a" else 1.0)
    for model_id in ("a", "b"):
        for _ in range(1000):
            scheduler.add(model_id, Work(model_id, 30, "forward"))
    taken = Counter(itertools.chain(*(scheduler.next(600, MANY) for _ in range(40))))
    assert taken["a"] / taken["b"] == pytest.approx(weight, rel=0.1)


def test_a_newcomer_goes_before_deep_queues() -> None:
    scheduler = filled([("busy", 100, "forward")] * 1000, quantum=100)
    for _ in range(10):
        scheduler.next(100, MANY)
    scheduler.add("new", Work(("new", 0), 5, "forward"))
    assert scheduler.next(100, MANY)[0] == ("new", 0)


def test_coming_back_at_once_gains_no_more_than_a_share() -> None:
    """A model that keeps one large request waiting is new each time, were it not for the round it has to sit out."""
    scheduler = filled([("deep", 100, "forward")] * 1000, quantum=100)
    tokens: Counter[str] = Counter()
    for _ in range(100):
        scheduler.add("shallow", Work(("shallow", 0), 300, "forward"))
        for model_id, _ in scheduler.next(300, MANY):
            tokens[model_id] += 300 if model_id == "shallow" else 100
    assert tokens["shallow"] <= tokens["deep"] + 600


def test_a_request_that_does_not_fit_has_the_next_step() -> None:
    scheduler = filled([("a", 60, "forward"), ("b", 60, "forward"), ("c", 30, "forward"), ("d", 30, "forward")])
    assert drain(scheduler, budget=100) == [[("a", 0), ("c", 2)], [("b", 1), ("d", 3)]]


def test_a_budget_of_one_runs_one_request_at_a_time() -> None:
    scheduler = filled([(model_id, cost, "forward") for model_id in "ab" for cost in (1, 40)])
    assert all(len(step) == 1 for step in drain(scheduler, budget=1))
