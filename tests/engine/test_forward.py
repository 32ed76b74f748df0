"""Requests that share batches get what they get alone, and one that fails harms nobody."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import Tensor

from builders import LOSSES, datums, floats, poisoned, random_sequences, request
from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    CreateModel,
    Datums,
    ForwardBackward,
    ForwardResult,
    OptimStep,
    OptimStepResult,
)
from xorl.engine.engine import Engine
from xorl.errors import InvalidRequest, NonFinite, OutOfMemory, UnknownId
from xorl.types import (
    LORA_PROJECTIONS,
    UNEMBEDDING,
    AdamParams,
    CrossEntropy,
    DrGrpo,
    LoraSpec,
    Ppo,
)

NewEngine = Callable[..., Engine]
ADAM = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)


def create(engine: Engine, model_ids: Sequence[str], **spec: Any) -> None:
    """Adapters of unlike ranks, of which none is zero any more; models a multiple of 3 train the unembedding too."""
    for number, model_id in enumerate(model_ids):
        targets = (*LORA_PROJECTIONS, UNEMBEDDING) if number % 3 == 0 else LORA_PROJECTIONS
        lora = LoraSpec(rank=2 + number % 5, alpha=8, seed=number, target_modules=targets)
        engine.run(CreateModel(model_id=model_id, lora=lora))
        generator = torch.Generator().manual_seed(number)
        for name, parameter in engine.models[model_id].parameters.items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=generator)


def step(engine: Engine, commands: Sequence[AnyCommand]) -> list[AnyResult | Exception]:
    """Run commands in one step."""
    results: list[AnyResult | Exception] = []
    for outcome in engine.compute(engine.prepare(commands)):
        try:
            results.append(outcome())
        except Exception as error:
            results.append(error)
    return results


def gradients(engine: Engine, model_id: str) -> dict[str, Tensor]:
    return {name: gradient.clone() for name, gradient in engine.models[model_id].gradients().items()}


def assert_same_result(actual: AnyResult | Exception, expected: AnyResult | Exception) -> None:
    assert isinstance(actual, ForwardResult)
    assert isinstance(expected, ForwardResult)
    np.testing.assert_allclose(floats(actual.logprobs), floats(expected.logprobs), rtol=1e-4, atol=1e-5)
    assert (actual.elementwise_loss is None) == (expected.elementwise_loss is None)
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)


def assert_same_gradients(engine: Engine, other: Engine, model_id: str) -> None:
    actual, expected = gradients(engine, model_id), gradients(other, model_id)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("max_batch_tokens", [30, 8192])
def test_coalesced_equals_alone(new_engine: NewEngine, max_batch_tokens: int) -> None:
    """Four models, all losses, with and without a gradient, several requests of each, whatever the batches."""
    model_ids = "abcd"
    together, alone = new_engine(max_batch_tokens=max_batch_tokens), new_engine()
    for engine in (together, alone):
        create(engine, model_ids)
    commands = [
        request(model_ids[number % 4], loss, number, backward=number % 5 != 0)
        for number, loss in enumerate([*LOSSES, *LOSSES])
    ]
    actual, expected = step(together, commands), [alone.run(command) for command in commands]
    for one, other in zip(actual, expected, strict=True):
        assert_same_result(one, other)
    for model_id in model_ids:
        assert_same_gradients(together, alone, model_id)
    optim = [OptimStep(model_id=model_id, adam=ADAM) for model_id in model_ids]
    for one, command in zip(step(together, optim), optim, strict=True):
        other = alone.run(command)
        assert isinstance(one, OptimStepResult)
        assert isinstance(other, OptimStepResult)
        assert (one.grad_norm, one.step) == (pytest.approx(other.grad_norm, rel=1e-3), other.step)


def test_soft_targets_share_a_step_with_single_ones(new_engine: NewEngine) -> None:
    engine, alone = new_engine(), new_engine()
    for each in (engine, alone):
        create(each, "ab")
    rng = np.random.default_rng(1)
    single = request("a", CrossEntropy(), 3)
    tokens = rng.integers(3, 128, 5).astype(np.int32)
    targets = rng.integers(3, 128, (5, 2)).astype(np.int32)
    weights = rng.normal(size=(5, 2)).astype(np.float32)
    soft = Datums(
        tokens=tokens.tobytes(),
        offsets=np.array([0, 5], np.int32).tobytes(),
        targets=targets.tobytes(),
        loss_inputs={"weights": weights.tobytes()},
        num_targets=2,
    )
    commands = [single, ForwardBackward(model_id="b", datums=soft, loss=CrossEntropy(), token_mean=False)]
    for one, command in zip(step(engine, commands), commands, strict=True):
        assert_same_result(one, alone.run(command))
    for model_id in "ab":
        assert_same_gradients(engine, alone, model_id)


@pytest.mark.parametrize("place", [0, 7, 15])
def test_one_poisoned_request_among_sixteen_harms_nobody(new_engine: NewEngine, place: int) -> None:
    model_ids = [str(number) for number in range(8)]
    engine, without = new_engine(), new_engine()
    for each in (engine, without):
        create(each, model_ids)
    good = [request(model_ids[number % 8], Ppo(), number) for number in range(15)]
    results = step(engine, [*good[:place], poisoned("3"), *good[place:]])
    failed = results.pop(place)
    assert isinstance(failed, NonFinite)
    assert "data[1]" in str(failed)
    expected = step(without, good)
    for one, other in zip(results, expected, strict=True):
        assert_same_result(one, other)
    for model_id in model_ids:
        assert_same_gradients(engine, without, model_id)
        norms = [each.run(OptimStep(model_id=model_id, adam=ADAM)) for each in (engine, without)]
        assert norms[0].grad_norm == pytest.approx(norms[1].grad_norm, rel=1e-4)


def test_a_request_whose_gradient_alone_failed_leaves_no_step(new_engine: NewEngine) -> None:
    engine = new_engine()
    create(engine, "a")
    before = {name: parameter.clone() for name, parameter in engine.models["a"].parameters.items()}
    assert isinstance(step(engine, [poisoned("a")])[0], NonFinite)
    result = engine.run(OptimStep(model_id="a", adam=AdamParams(weight_decay=0.1)))
    assert (result.grad_norm, result.step) == (0.0, 0)
    assert all(torch.equal(before[name], now) for name, now in engine.models["a"].parameters.items())


def test_nan_weights_of_one_model_stay_its_own(new_engine: NewEngine) -> None:
    """Its hidden states are NaN through and through, in a batch with others'."""
    engine, alone = new_engine(), new_engine()
    for each in (engine, alone):
        create(each, "ab")
    engine.models["a"].parameters["model.layers.0.mlp.up_proj.lora_B"].fill_(float("nan"))
    commands = [request("a", CrossEntropy(), 1), request("b", CrossEntropy(), 2)]
    failed, result = step(engine, commands)
    assert isinstance(failed, NonFinite)
    assert_same_result(result, alone.run(commands[1]))
    assert_same_gradients(engine, alone, "b")
    assert not any(gradient.any() for gradient in gradients(engine, "a").values())


def without_references() -> Any:
    command = request("a", DrGrpo(), 1)
    inputs = {name: array for name, array in command.datums.loss_inputs.items() if name != "ref_logprobs"}
    data = structs.replace(command.datums, loss_inputs=inputs)
    return structs.replace(command, datums=data, loss=DrGrpo(beta=0.1))


def of_odd_length() -> Any:
    command = request("a", CrossEntropy(), 1)
    return structs.replace(command, datums=structs.replace(command.datums, targets=b"123"))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (request("unknown", CrossEntropy(), 1), UnknownId),
        (without_references(), InvalidRequest),  # found out while it computes
        (of_odd_length(), ValueError),  # while it is prepared
    ],
)
def test_a_request_that_cannot_run_fails_alone(new_engine: NewEngine, bad: AnyCommand, error: type[Exception]) -> None:
    engine, alone = new_engine(), new_engine()
    for each in (engine, alone):
        create(each, "ab")
    commands = [request("a", CrossEntropy(), 2), bad, request("b", Ppo(), 3)]
    results = step(engine, commands)
    assert isinstance(results[1], error)
    for place in (0, 2):
        assert_same_result(results[place], alone.run(commands[place]))
    for model_id in "ab":
        assert_same_gradients(engine, alone, model_id)


@pytest.mark.parametrize("fits", [40, 12, 8])
def test_what_does_not_fit_runs_in_smaller_batches(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    """Down to the longest datum; then each request alone, so that only the one with the long datum fails."""
    engine, alone = new_engine(), new_engine()
    for each in (engine, alone):
        create(each, "abc")
    lengths = {"a": (8, 8, 8), "b": (12, 5), "c": (8, 1)}
    rng = np.random.default_rng(0)
    commands = [
        ForwardBackward(
            model_id=model_id, datums=datums(random_sequences(rng, each)), loss=CrossEntropy(), token_mean=True
        )
        for model_id, each in lengths.items()
    ]
    hidden_states = engine.base.hidden_states

    def scarce(tokens: Tensor, *places: Any) -> Tensor:
        if len(tokens) > fits:
            raise torch.OutOfMemoryError("injected")
        return hidden_states(tokens, *places)

    monkeypatch.setattr(engine.base, "hidden_states", scarce)
    for command, result in zip(commands, step(engine, commands), strict=True):
        if max(lengths[command.model_id]) > fits:
            assert isinstance(result, OutOfMemory)
            assert "12 tokens" in str(result)
            assert not gradients(engine, command.model_id)
        else:
            assert_same_result(result, alone.run(command))
            assert_same_gradients(engine, alone, command.model_id)
    monkeypatch.undo()
    for command in commands:
        assert isinstance(step(engine, [command])[0], ForwardResult)


def test_memory_that_runs_out_in_backward_leaves_no_half_gradient(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, alone = new_engine(max_batch_tokens=24), new_engine()
    for each in (engine, alone):
        create(each, "ab")
    commands = [request(model_id, CrossEntropy(), seed) for model_id, seed in (("a", 3), ("b", 7), ("a", 11))]
    backward, calls = torch.autograd.backward, []

    def scarce(*arguments: Any) -> None:
        calls.append(1)
        backward(*arguments)
        if len(calls) == 2:  # the second batch, after its gradients were added
            raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(torch.autograd, "backward", scarce)
    results = step(engine, commands)
    assert len(calls) > 3
    for one, command in zip(results, commands, strict=True):
        assert_same_result(one, alone.run(command))
    for model_id in "ab":
        assert_same_gradients(engine, alone, model_id)


def test_models_of_a_step_stay_while_it_runs(new_engine: NewEngine) -> None:
    """Two of three models fit: a step of two, one of them evicted, brings it back without losing the other."""
    engine, roomy = new_engine(max_resident_adapters=2), new_engine()
    for each in (engine, roomy):
        create(each, "abc")
    for pair in ("ab", "bc", "ca", "ac"):
        commands = [request(model_id, CrossEntropy(), ord(model_id)) for model_id in pair]
        for one, other in zip(step(engine, commands), step(roomy, commands), strict=True):
            assert one == other
    for model_id in "abc":
        assert engine.run(OptimStep(model_id=model_id, adam=ADAM)) == roomy.run(OptimStep(model_id=model_id, adam=ADAM))


@pytest.mark.parametrize("setting", ["activation_checkpointing", "offload_activations"])
def test_where_activations_are_kept_changes_nothing(new_engine: NewEngine, setting: str) -> None:
    engines = [new_engine(), new_engine(**{setting: True})]
    commands = [request(model_id, Ppo(), number) for number, model_id in enumerate("aab")]
    for engine in engines:
        create(engine, "ab")
    assert step(engines[0], commands) == step(engines[1], commands)
    for model_id in "ab":
        expected = gradients(engines[0], model_id)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(engines[1], model_id).items())
