"""Order within a model, fairness between models."""

from hypothesis import given
from hypothesis import strategies as st

from xorl.engine.scheduler import Scheduler


def drain(scheduler: Scheduler[tuple[str, int]]) -> list[tuple[str, int]]:
    taken = []
    while (item := scheduler.next()) is not None:
        taken.append(item)
    return taken


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 300))), st.integers(1, 100))
def test_everything_runs_once_and_each_model_in_order(arrivals: list[tuple[str, int]], quantum: int) -> None:
    scheduler: Scheduler[tuple[str, int]] = Scheduler(quantum)
    for number, (model_id, cost) in enumerate(arrivals):
        scheduler.add(model_id, (model_id, number), cost)
    taken = drain(scheduler)
    for name in "abc":
        expected = [number for number, (model_id, _) in enumerate(arrivals) if model_id == name]
        assert [number for model_id, number in taken if model_id == name] == expected
    assert len(taken) == len(arrivals)


@given(st.lists(st.integers(1, 50), min_size=40, max_size=60), st.lists(st.integers(1, 50), min_size=40, max_size=60))
def test_two_busy_models_get_equal_tokens(a: list[int], b: list[int]) -> None:
    scheduler: Scheduler[tuple[str, int]] = Scheduler(50)
    for model_id, costs in (("a", a), ("b", b)):
        for cost in costs:
            scheduler.add(model_id, (model_id, cost), cost)
    tokens = {"a": 0, "b": 0}
    for _ in range(40):  # neither queue can be empty before
        model_id, cost = scheduler.next() or ("", 0)
        tokens[model_id] += cost
        assert abs(tokens["a"] - tokens["b"]) <= 3 * 50


def test_a_deep_queue_does_not_starve_a_newcomer() -> None:
    scheduler: Scheduler[tuple[str, int]] = Scheduler(100)
    for number in range(1000):
        scheduler.add("busy", ("busy", number), 100)
    for _ in range(10):
        scheduler.next()
    scheduler.add("new", ("new", 0), 100)
    assert ("new", 0) in [scheduler.next() for _ in range(3)]
