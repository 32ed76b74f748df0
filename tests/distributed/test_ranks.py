"""Several ranks do what one does, and what fails on one of them fails alone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import LOSSES, datums, floats, poisoned, random_sequences, request, sync_into
from rank_group import Group, Pool, set_b, starve
from sync.fake_sglang import FakeSglang
from xorl.engine.commands import (
    CreateModel,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    OptimStep,
    SaveSampler,
    SaveWeights,
    Sleep,
    UnloadModel,
    WakeUp,
)
from xorl.errors import CheckpointError, InvalidRequest, NonFinite, OutOfMemory, UnknownId
from xorl.types import LORA_PROJECTIONS, UNEMBEDDING, AdamParams, CrossEntropy, LoraSpec

ADAM = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0, eps=1e-3)  # so that a tiny gradient's rounding moves little
TENANTS = {
    "a": (*LORA_PROJECTIONS, UNEMBEDDING),
    "b": LORA_PROJECTIONS,
    "c": ("q_proj", "down_proj"),
    "d": (UNEMBEDDING,),
}
SHAPES = [(2, "never"), (3, "never"), (2, "always"), (3, "always")]
shapes = pytest.mark.parametrize(("size", "shard"), SHAPES)

NewGroup = Callable[..., Group]


@pytest.fixture
def new_group(pool: Pool, tiny_model: Path, tmp_path: Path) -> Iterator[NewGroup]:
    """Starts an engine of some ranks, in place of the one before; batches are so small that ranks have several."""
    with ExitStack() as stack:

        def make(size: int, shard: str = "never", **settings: object) -> Group:
            stack.close()
            defaults = {"model": str(tiny_model), "output_dir": str(tmp_path), "max_batch_tokens": 30, "shard": shard}
            group: AbstractContextManager[Group] = pool.engine(size, tmp_path, **defaults | settings)
            return stack.enter_context(group)

        yield make


def with_tenants(group: Group) -> Group:
    for number, (model_id, targets) in enumerate(TENANTS.items()):
        lora = LoraSpec(rank=2 + number, alpha=8, seed=number, target_modules=targets)
        group.run(CreateModel(model_id=model_id, lora=lora))
        group.all(set_b, model_id, number)
    return group


def assert_same_result(actual: Any, expected: Any) -> None:
    assert isinstance(actual, ForwardResult), actual
    np.testing.assert_allclose(floats(actual.logprobs), floats(expected.logprobs), rtol=1e-4, atol=1e-4)
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-3)


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-3) -> None:
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        np.testing.assert_allclose(array, expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def train_tenants(group: Group) -> tuple[list[Any], list[dict[str, np.ndarray]]]:
    """Two steps of all tenants and losses mixed; the results, and all gradients and weights."""
    results, states = [], []
    for first in (0, 20):
        commands = [
            request(model_id, loss, first + number, backward=number % 5 != 0)
            for number, (model_id, loss) in enumerate(zip("abcdabcda", LOSSES, strict=True))
        ]
        results += group.step(*commands)
        states += [group.gradients(model_id) for model_id in TENANTS]
        results += group.step(*(OptimStep(model_id=model_id, adam=ADAM) for model_id in TENANTS))
        states += [group.weights(model_id) for model_id in TENANTS]
    return results, states


@pytest.fixture(scope="module")
def tenants_of_one_rank(
    pool: Pool, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], list[dict[str, np.ndarray]]]:
    path = tmp_path_factory.mktemp("one")
    with pool.engine(1, path, model=str(tiny_model), output_dir=str(path)) as group:
        return train_tenants(with_tenants(group))


@shapes
def test_many_tenants_with_all_losses_equal_one_rank(
    new_group: NewGroup, tenants_of_one_rank: tuple[list[Any], list[dict[str, np.ndarray]]], size: int, shard: str
) -> None:
    results, states = train_tenants(with_tenants(new_group(size, shard)))
    for actual, expected in zip(results, tenants_of_one_rank[0], strict=True):
        if isinstance(expected, ForwardResult):
            assert_same_result(actual, expected)
        else:
            assert (actual.grad_norm, actual.step) == (pytest.approx(expected.grad_norm, rel=1e-3), expected.step)
    for actual, expected in zip(states, tenants_of_one_rank[1], strict=True):
        assert_close(actual, expected)


def train_full(group: Group) -> tuple[list[Any], dict[str, np.ndarray]]:
    group.run(CreateModel(model_id="default", lora=None))
    results = []
    for seed in (1, 2, 3):
        for loss in LOSSES[:3]:
            results.append(group.run(request("default", loss, 4 * seed + 2)))
        results.append(group.run(OptimStep(model_id="default", adam=ADAM)))
    return results, group.weights("default")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "shard"), [(2, "never"), (2, "always"), (3, "always")])
def test_full_weights_equal_one_rank(
    new_group: NewGroup, tied_models: dict[bool, Path], size: int, shard: str, tied: bool
) -> None:
    settings = {"full": True, "model": str(tied_models[tied])}
    expected, weights = train_full(new_group(1, **settings))
    actual, own_weights = train_full(new_group(size, shard, **settings))
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, ForwardResult):
            assert_same_result(one, other)
        else:
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)
    assert_close(own_weights, weights)


@shapes
def test_one_poisoned_request_harms_nobody(new_group: NewGroup, size: int, shard: str) -> None:
    group = with_tenants(new_group(size, shard))
    good = [request(model_id, loss, 5) for model_id, loss in zip("abcd", LOSSES, strict=False)]
    expected = group.step(*good)
    gradients = {model_id: group.gradients(model_id) for model_id in TENANTS}
    for model_id in TENANTS:
        group.run(OptimStep(model_id=model_id, adam=AdamParams(learning_rate=0.0)))
    unknown = Forward(model_id="nobody", datums=good[0].datums, loss=CrossEntropy())
    first, second, lost, *others = group.step(poisoned("b"), poisoned("c"), unknown, *good)
    assert [type(each) for each in (first, second, lost)] == [NonFinite, NonFinite, UnknownId]
    assert "data[1]" in str(first)
    for actual, want in zip(others, expected, strict=True):
        assert_same_result(actual, want)
    for model_id in TENANTS:
        assert_close(group.gradients(model_id), gradients[model_id])


def test_memory_that_runs_out_on_one_rank_halves_the_batches_of_all(new_group: NewGroup) -> None:
    group = with_tenants(new_group(2))
    data = datums(random_sequences(np.random.default_rng(0), (9,) * 12))
    want = group.run(ForwardBackward(model_id="b", datums=data, loss=CrossEntropy(), token_mean=True))
    gradients = group.gradients("b")
    group.run(OptimStep(model_id="b", adam=AdamParams(learning_rate=0.0)))
    group.all(starve, 1, 12)
    actual = group.run(ForwardBackward(model_id="b", datums=data, loss=CrossEntropy(), token_mean=True))
    assert_same_result(actual, want)
    assert_close(group.gradients("b"), gradients)


def test_a_datum_that_does_not_fit_on_one_rank_fails_alone_and_leaves_nothing(new_group: NewGroup) -> None:
    group = with_tenants(new_group(2))
    group.all(starve, 1, 12)
    rng = np.random.default_rng(0)
    commands = [
        ForwardBackward(
            model_id=model_id,
            datums=datums(random_sequences(rng, lengths)),
            loss=CrossEntropy(),
            token_mean=True,
        )
        for model_id, lengths in (("a", (20, 19)), ("b", (9, 9)))  # of a pair, each rank has one
    ]
    failed, done = group.step(*commands)
    assert isinstance(failed, OutOfMemory)
    assert "rank 1" in str(failed)
    assert isinstance(done, ForwardResult)
    assert not any(gradient.any() for gradient in group.gradients("a").values())
    assert any(gradient.any() for gradient in group.gradients("b").values())


def test_models_begin_alike_without_a_seed_and_come_back_from_eviction(new_group: NewGroup) -> None:
    group = new_group(2, max_resident_adapters=1)
    for model_id in ("a", "b"):
        group.run(CreateModel(model_id=model_id, lora=LoraSpec(rank=2)))
    before = {model_id: group.weights(model_id) for model_id in ("a", "b")}
    for model_id in ("a", "b", "a", "b"):
        group.run(request(model_id, CrossEntropy(), 6))
        group.run(OptimStep(model_id=model_id, adam=ADAM))
    for model_id, weights in before.items():
        after = group.weights(model_id)
        assert any((after[name] != weight).any() for name, weight in weights.items())
    group.run(UnloadModel(model_id="a"))
    with pytest.raises(UnknownId):
        group.run(request("a", CrossEntropy(), 6))


@pytest.mark.parametrize("shard", ["never", "always"])
def test_sleep_changes_nothing(new_group: NewGroup, shard: str) -> None:
    group = with_tenants(new_group(2, shard))
    want = group.run(request("b", CrossEntropy(), 6))
    group.run(Sleep())
    group.run(WakeUp())
    assert_same_result(group.run(request("b", CrossEntropy(), 6)), want)


@pytest.mark.parametrize(
    ("full", "shard", "sizes"), [(False, "never", (2, 1, 3)), (True, "always", (2, 1, 3)), (True, "always", (1, 2))]
)
def test_what_some_ranks_save_others_load(
    new_group: NewGroup, tmp_path: Path, full: bool, shard: str, sizes: tuple[int, ...]
) -> None:
    """To the bit; and the step after it is the same."""
    model_id = "default" if full else "m"
    create = CreateModel(model_id=model_id, lora=None if full else LoraSpec(rank=3, alpha=6))
    data, optim = request(model_id, CrossEntropy(), 7), OptimStep(model_id=model_id, adam=ADAM)
    directory = str(tmp_path / "checkpoint")

    group = new_group(sizes[0], shard, full=full)
    for command in (create, data, optim):
        group.run(command)
    size_bytes = group.run(SaveWeights(model_id=model_id, directory=directory, name="n")).size_bytes
    assert size_bytes > 0
    with pytest.raises(InvalidRequest, match="exists already"):
        group.run(SaveWeights(model_id=model_id, directory=directory, name="n"))
    saved = group.weights(model_id)
    group.run(data)
    norm = group.run(optim).grad_norm
    trained = group.weights(model_id)

    for size in sizes[1:]:
        other = new_group(size, shard, full=full)
        other.run(create)
        other.run(LoadWeights(model_id=model_id, directory=directory, optimizer=True))
        for name, weight in other.weights(model_id).items():
            np.testing.assert_array_equal(weight, saved[name])
        other.run(data)
        assert other.run(optim).grad_norm == pytest.approx(norm, rel=1e-4)
        assert_close(other.weights(model_id), trained)
    with pytest.raises(CheckpointError):
        other.run(LoadWeights(model_id=model_id, directory=str(tmp_path / "nowhere"), optimizer=True))


@pytest.mark.parametrize(("full", "shard"), [(False, "never"), (True, "always")])
def test_the_first_rank_writes_what_inference_servers_load(
    new_group: NewGroup, tmp_path: Path, full: bool, shard: str
) -> None:
    files = {}
    for size in (1, 2):
        group = new_group(size, shard, full=full)
        model_id = "default" if full else "b"
        group.run(CreateModel(model_id=model_id, lora=None if full else LoraSpec(rank=3, seed=1)))
        group.run(SaveSampler(model_id=model_id, directory=str(tmp_path / str(size)), name="n"))
        files[size] = {
            path.name: path.read_bytes() for path in (tmp_path / str(size)).iterdir() if path.suffix == ".safetensors"
        }
    assert files[1] == files[2] != {}


@pytest.mark.parametrize(("full", "shard"), [(False, "never"), (False, "always"), (True, "always")])
def test_a_weight_sync_sends_what_one_rank_would(new_group: NewGroup, tmp_path: Path, full: bool, shard: str) -> None:
    served = []
    for size in (1, 2):
        group = new_group(size, shard, full=full)
        model_id = "default" if full else "b"
        if full:
            group.run(CreateModel(model_id=model_id, lora=None))
        else:
            with_tenants(group)
        with FakeSglang().serving() as server:
            (endpoint,) = group.run(sync_into(server.port, model_id=model_id)).endpoints
            assert endpoint.success, endpoint.message
            served.append(server.weights)
    assert served[0].keys() == served[1].keys()
    for name, weight in served[0].items():
        assert weight.equal(served[1][name]), name
