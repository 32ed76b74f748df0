"""What training commands do to a model, held against plain PyTorch."""

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from builders import datums, floats, random_sequences
from tiny import save_tiny_model
from xorl.engine.commands import (
    CreateModel,
    Datums,
    Forward,
    ForwardBackward,
    LoadWeights,
    OptimStep,
    SaveSampler,
    SaveWeights,
    Sleep,
    UnloadModel,
    WakeUp,
)
from xorl.engine.engine import Engine
from xorl.errors import Asleep, CheckpointError, InvalidRequest, NonFinite, OutOfMemory, StorageFull, UnknownId
from xorl.types import LORA_PROJECTIONS, AdamParams, CrossEntropy, ImportanceSampling, LoraSpec, Ppo

NewEngine = Callable[..., Engine]
ADAM = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)
SPEC = LoraSpec(rank=4, alpha=8, seed=7)


@pytest.fixture
def engine(new_engine: NewEngine) -> Engine:
    engine = new_engine()
    engine.run(CreateModel(model_id="m", lora=SPEC))
    return engine


def some_datums(seed: int = 0, lengths: tuple[int, ...] = (5, 17, 1, 9)) -> Datums:
    rng = np.random.default_rng(seed)
    return datums(random_sequences(rng, lengths), weights=[rng.normal(size=length) for length in lengths])


def train(engine: Engine, batch: Datums, model_id: str = "m", steps: int = 1, **options: bool) -> list[float]:
    sums = []
    for _ in range(steps):
        command = ForwardBackward(
            model_id=model_id, datums=batch, loss=CrossEntropy(), token_mean=options.get("token_mean", True)
        )
        sums.append(engine.run(command).metrics["loss:sum"])
        engine.run(OptimStep(model_id=model_id, adam=ADAM))
    return sums


def evaluate(engine: Engine, batch: Datums, model_id: str = "m") -> np.ndarray:
    return floats(engine.run(Forward(model_id=model_id, datums=batch, loss=CrossEntropy())).logprobs)


def gradients(engine: Engine, model_id: str = "m") -> dict[str, Tensor]:
    return {name: gradient.clone() for name, gradient in engine.models[model_id].gradients().items()}


def plain_steps(network: nn.Module, batch: Datums, steps: int) -> tuple[list[float], np.ndarray]:
    """The same training as a bare loop: one sequence at a time, torch's AdamW and clipping; logprobs afterwards."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=ADAM.learning_rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=0)
    offsets = np.frombuffer(batch.offsets, np.int32)
    tokens = torch.tensor(np.frombuffer(batch.tokens, np.int32)).long()
    targets = torch.tensor(np.frombuffer(batch.targets, np.int32)).long()
    weights = torch.tensor(floats(batch.loss_inputs["weights"]))

    def logprobs() -> Tensor:
        parts = []
        for a, b in itertools.pairwise(offsets):
            logits = network(input_ids=tokens[None, a:b]).logits[0]
            parts.append(logits.log_softmax(-1).gather(1, targets[a:b, None])[:, 0])
        return torch.cat(parts)

    sums = []
    for _ in range(steps):
        loss = -(weights * logprobs()).sum()
        (loss / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, ADAM.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        sums.append(loss.item())
    with torch.no_grad():
        return sums, logprobs().numpy()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_lora_training_equals_a_plain_peft_loop(arch: str, tiny_models: dict[str, Path], new_engine: NewEngine) -> None:
    engine = new_engine(model=str(tiny_models[arch]))
    engine.run(CreateModel(model_id="m", lora=SPEC))
    config = LoraConfig(r=SPEC.rank, lora_alpha=8, target_modules=list(LORA_PROJECTIONS))
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models[arch], dtype=torch.float32), config)
    for name, ours in engine.models["m"].parameters.items():
        theirs = peft.get_parameter(f"base_model.model.{name}.default.weight")
        theirs.data.copy_(ours.data)
    batch = some_datums()
    ours = train(engine, batch, steps=20)
    theirs, expected = plain_steps(peft, batch, steps=20)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-3)
    np.testing.assert_allclose(evaluate(engine, batch), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_full_training_equals_a_plain_torch_loop(
    arch: str, tiny_models: dict[str, Path], new_engine: NewEngine
) -> None:
    engine = new_engine(model=str(tiny_models[arch]), full=True)
    engine.run(CreateModel(model_id="default", lora=None))
    network = AutoModelForCausalLM.from_pretrained(tiny_models[arch], dtype=torch.float32)
    batch = some_datums()
    ours = train(engine, batch, "default", steps=20)
    theirs, expected = plain_steps(network, batch, steps=20)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-3)
    np.testing.assert_allclose(evaluate(engine, batch, "default"), expected, rtol=2e-3, atol=2e-3)


def test_packing_changes_nothing(new_engine: NewEngine) -> None:
    batch = some_datums(lengths=(5, 17, 1, 9, 17, 3))
    outputs = []
    for max_batch_tokens in (1, 20, 8192):
        engine = new_engine(max_batch_tokens=max_batch_tokens)
        engine.run(CreateModel(model_id="m", lora=SPEC))
        result = engine.run(ForwardBackward(model_id="m", datums=batch, loss=CrossEntropy(), token_mean=True))
        outputs.append((floats(result.logprobs), result.metrics, gradients(engine)))
    for logprobs, metrics, grads in outputs[1:]:
        np.testing.assert_allclose(logprobs, outputs[0][0], atol=1e-5)
        assert metrics == pytest.approx(outputs[0][1], abs=1e-4)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, outputs[0][2][name], rtol=1e-4, atol=1e-4)


def test_forward_equals_forward_backward_and_leaves_no_gradient(engine: Engine) -> None:
    batch = some_datums()
    forward = engine.run(Forward(model_id="m", datums=batch, loss=CrossEntropy()))
    assert not gradients(engine)
    both = engine.run(ForwardBackward(model_id="m", datums=batch, loss=CrossEntropy(), token_mean=True))
    assert both == forward
    assert gradients(engine)


@pytest.mark.parametrize("token_mean", [True, False])
def test_two_accumulated_calls_equal_one(new_engine: NewEngine, token_mean: bool) -> None:
    rng = np.random.default_rng(1)
    sequences = random_sequences(rng, (8, 8, 5, 3))
    norms, after = [], []
    for parts in ([sequences], [sequences[:1], sequences[1:]]):
        engine = new_engine()
        engine.run(CreateModel(model_id="m", lora=SPEC))
        for part in parts:
            engine.run(ForwardBackward(model_id="m", datums=datums(part), loss=CrossEntropy(), token_mean=token_mean))
        norms.append(engine.run(OptimStep(model_id="m", adam=ADAM)).grad_norm)
        after.append(evaluate(engine, datums(sequences)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    np.testing.assert_allclose(after[0], after[1], atol=1e-4)


def test_token_mean_divides_the_gradient_by_the_valid_tokens(new_engine: NewEngine) -> None:
    batch = datums(random_sequences(np.random.default_rng(2), (8, 4)))
    norms = []
    for token_mean in (True, False):
        engine = new_engine()
        engine.run(CreateModel(model_id="m", lora=SPEC))
        engine.run(ForwardBackward(model_id="m", datums=batch, loss=CrossEntropy(), token_mean=token_mean))
        norms.append(engine.run(OptimStep(model_id="m", adam=ADAM)).grad_norm)
    assert norms[1] == pytest.approx(12 * norms[0], rel=1e-5)


def test_a_failed_request_leaves_the_accumulated_gradient(engine: Engine) -> None:
    engine.run(ForwardBackward(model_id="m", datums=some_datums(), loss=CrossEntropy(), token_mean=True))
    before, tokens = gradients(engine), engine.models["m"].num_mean_tokens
    rng = np.random.default_rng(3)
    poisoned = datums(
        random_sequences(rng, (4, 6)),
        logprobs=[np.zeros(4), np.full(6, -300.0)],
        advantages=[np.ones(4), -np.ones(6)],
    )
    with pytest.raises(NonFinite, match=r"data\[1\]"):
        engine.run(ForwardBackward(model_id="m", datums=poisoned, loss=Ppo(), token_mean=True))
    after = gradients(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.models["m"].num_mean_tokens == tokens
    train(engine, some_datums())


def test_step_without_gradient_leaves_the_weights(engine: Engine) -> None:
    before = evaluate(engine, some_datums())
    result = engine.run(OptimStep(model_id="m", adam=AdamParams(weight_decay=0.1)))
    assert (result.grad_norm, result.step) == (0.0, 0)
    assert np.array_equal(before, evaluate(engine, some_datums()))


def test_an_infinite_gradient_is_refused_and_dropped(engine: Engine) -> None:
    engine.run(ForwardBackward(model_id="m", datums=some_datums(), loss=CrossEntropy(), token_mean=True))
    before = evaluate(engine, some_datums())
    next(iter(engine.models["m"].gradients().values())).fill_(float("inf"))
    with pytest.raises(NonFinite):
        engine.run(OptimStep(model_id="m", adam=ADAM))
    assert np.array_equal(before, evaluate(engine, some_datums()))
    train(engine, some_datums())


def test_loading_restores_to_the_bit(engine: Engine, tmp_path: Path) -> None:
    train(engine, some_datums(), steps=3)
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    saved = evaluate(engine, some_datums())
    continued = train(engine, some_datums(5), steps=3)
    engine.run(LoadWeights(model_id="m", directory=str(tmp_path / "c"), optimizer=True))
    assert np.array_equal(saved, evaluate(engine, some_datums()))
    assert train(engine, some_datums(5), steps=3) == continued
    assert engine.run(OptimStep(model_id="m", adam=ADAM)).step == 6


def test_loading_without_the_optimizer_starts_it_fresh(engine: Engine, tmp_path: Path) -> None:
    train(engine, some_datums(), steps=3)
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    engine.run(LoadWeights(model_id="m", directory=str(tmp_path / "c"), optimizer=False))
    assert engine.models["m"].num_steps == 0
    assert all(not state.any() for state in engine.models["m"].optimizer_state().values())


def test_loading_drops_accumulated_gradients(engine: Engine, tmp_path: Path) -> None:
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    engine.run(ForwardBackward(model_id="m", datums=some_datums(), loss=CrossEntropy(), token_mean=True))
    engine.run(LoadWeights(model_id="m", directory=str(tmp_path / "c"), optimizer=True))
    assert engine.run(OptimStep(model_id="m", adam=ADAM)).grad_norm == 0


def test_full_weights_restore_to_the_bit(new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine(full=True)
    engine.run(CreateModel(model_id="default", lora=None))
    train(engine, some_datums(), "default", steps=2)
    engine.run(SaveWeights(model_id="default", directory=str(tmp_path / "c"), name="c"))
    saved, continued = evaluate(engine, some_datums(), "default"), train(engine, some_datums(5), "default", steps=2)
    engine.run(LoadWeights(model_id="default", directory=str(tmp_path / "c"), optimizer=True))
    assert np.array_equal(saved, evaluate(engine, some_datums(), "default"))
    assert train(engine, some_datums(5), "default", steps=2) == continued


def test_a_damaged_checkpoint_is_named_and_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    train(engine, some_datums())
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    before = evaluate(engine, some_datums())
    victim = next(path for path in (tmp_path / "c").iterdir() if path.suffix == ".distcp")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=victim.name):
        engine.run(LoadWeights(model_id="m", directory=str(tmp_path / "c"), optimizer=True))
    assert np.array_equal(before, evaluate(engine, some_datums()))


def test_a_checkpoint_of_another_rank_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    engine.run(CreateModel(model_id="other", lora=LoraSpec(rank=2, alpha=8)))
    with pytest.raises(CheckpointError, match="rank is 4"):
        engine.run(LoadWeights(model_id="other", directory=str(tmp_path / "c"), optimizer=True))


def test_an_adapters_alpha_is_restored_with_it(engine: Engine, tmp_path: Path) -> None:
    train(engine, some_datums(), steps=3)
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    engine.run(CreateModel(model_id="other", lora=LoraSpec(rank=4)))
    engine.run(LoadWeights(model_id="other", directory=str(tmp_path / "c"), optimizer=True))
    assert np.array_equal(evaluate(engine, some_datums()), evaluate(engine, some_datums(), "other"))


def test_a_checkpoint_of_another_model_is_refused(
    engine: Engine, new_engine: NewEngine, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    for settings, lora, message in (
        ({"model": str(tiny_models["llama"])}, SPEC, "base model"),
        ({"full": True}, None, "full weights"),
    ):
        other = new_engine(**settings)
        other.run(CreateModel(model_id="default", lora=lora))
        with pytest.raises(CheckpointError, match=message):
            other.run(LoadWeights(model_id="default", directory=str(tmp_path / "c"), optimizer=True))


def test_saving_over_a_checkpoint_needs_replace(engine: Engine, tmp_path: Path) -> None:
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    with pytest.raises(InvalidRequest, match="exists already"):
        engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c"))
    engine.run(SaveWeights(model_id="m", directory=str(tmp_path / "c"), name="c", replace=True))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("kind", [SaveWeights, SaveSampler])
@pytest.mark.parametrize("replace", [False, True])
def test_a_full_disk_fails_the_save_and_leaves_what_was_there(
    kind: type, replace: bool, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = kind(model_id="m", directory=str(tmp_path / "c"), name="c", replace=True)
    if replace:
        engine.run(command)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFull, match="checkpoint c: no space left"):
            engine.run(command)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    engine.run(command)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [LORA_PROJECTIONS, ("q_proj", "lm_head")])
def test_peft_loads_the_sampler_weights(
    new_engine: NewEngine, tmp_path: Path, targets: tuple[str, ...], tied: bool
) -> None:
    base = save_tiny_model(tmp_path / "base", "llama", tied=tied)
    engine = new_engine(model=str(base))
    engine.run(CreateModel(model_id="m", lora=LoraSpec(rank=4, alpha=10, target_modules=targets)))
    batch = some_datums()
    train(engine, batch, steps=3)
    engine.run(SaveSampler(model_id="m", directory=str(tmp_path / "s"), name="s"))
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(network, str(tmp_path / "s"))
    offsets = np.frombuffer(batch.offsets, np.int32)
    tokens, targets_T = (torch.tensor(np.frombuffer(x, np.int32)).long() for x in (batch.tokens, batch.targets))
    with torch.no_grad():
        expected = torch.cat(
            [
                peft(input_ids=tokens[None, a:b]).logits[0].log_softmax(-1).gather(1, targets_T[a:b, None])[:, 0]
                for a, b in itertools.pairwise(offsets)
            ]
        )
    np.testing.assert_allclose(evaluate(engine, batch), expected.numpy(), atol=1e-4)


def test_full_sampler_weights_are_a_model(new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine(full=True)
    engine.run(CreateModel(model_id="default", lora=None))
    train(engine, some_datums(), "default", steps=2)
    engine.run(SaveSampler(model_id="default", directory=str(tmp_path / "s"), name="s"))
    again = new_engine(full=True, model=str(tmp_path / "s"))
    again.run(CreateModel(model_id="default", lora=None))
    assert np.array_equal(evaluate(engine, some_datums(), "default"), evaluate(again, some_datums(), "default"))


def test_models_train_independently_and_survive_eviction(new_engine: NewEngine) -> None:
    """Three models taking turns in one slot get what each gets alone, gradients and moments included."""

    def run(engine: Engine, ids: list[str]) -> dict[str, np.ndarray]:
        for model_id in ids:
            engine.run(CreateModel(model_id=model_id, lora=LoraSpec(rank=2 + int(model_id), seed=int(model_id))))
        for step in range(3):
            for model_id in ids:
                engine.run(
                    ForwardBackward(model_id=model_id, datums=some_datums(step), loss=CrossEntropy(), token_mean=True)
                )
            for model_id in ids:
                engine.run(OptimStep(model_id=model_id, adam=ADAM))
        return {model_id: evaluate(engine, some_datums(), model_id) for model_id in ids}

    together = run(new_engine(max_resident_adapters=1), ["0", "1", "2"])
    for model_id, logprobs in together.items():
        assert np.array_equal(logprobs, run(new_engine(), [model_id])[model_id])


def test_a_model_that_cannot_be_set_aside_stays(
    new_engine: NewEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(max_resident_adapters=1)
    engine.run(CreateModel(model_id="m", lora=SPEC))
    train(engine, some_datums())
    before = evaluate(engine, some_datums())
    with monkeypatch.context() as patch:
        patch.setattr("xorl.engine.adapters.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(StorageFull, match="model m, idle, cannot make room: disk full"):
            engine.run(CreateModel(model_id="n", lora=LoraSpec(rank=2)))
    assert np.array_equal(before, evaluate(engine, some_datums()))
    engine.run(CreateModel(model_id="n", lora=LoraSpec(rank=3)))
    assert np.array_equal(before, evaluate(engine, some_datums()))


def test_an_evicted_model_is_unloaded_where_it_lies(new_engine: NewEngine, tmp_path: Path) -> None:
    engine = new_engine(max_resident_adapters=1)
    for model_id in ("m", "n"):
        engine.run(CreateModel(model_id=model_id, lora=SPEC))
    (spilled,) = tmp_path.rglob("*.safetensors")
    engine.run(UnloadModel(model_id="m"))
    assert not spilled.exists()
    assert engine.models.ids() == ["n"]


def test_a_seed_decides_the_start(new_engine: NewEngine) -> None:
    engine = new_engine()
    for model_id, seed in (("a", 1), ("b", 1), ("c", 2)):
        engine.run(CreateModel(model_id=model_id, lora=LoraSpec(seed=seed)))
    name = "model.layers.0.self_attn.q_proj.lora_A"
    a, b, c = (engine.models[model_id].parameters[name] for model_id in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_unloaded_and_unknown_models_are_named(engine: Engine) -> None:
    engine.run(UnloadModel(model_id="m"))
    with pytest.raises(UnknownId, match="model_id m"):
        engine.run(OptimStep(model_id="m", adam=ADAM))


def test_creating_again_keeps_the_state_or_names_the_difference(engine: Engine) -> None:
    train(engine, some_datums())
    before = evaluate(engine, some_datums())
    engine.run(CreateModel(model_id="m", lora=SPEC))
    assert np.array_equal(before, evaluate(engine, some_datums()))
    with pytest.raises(InvalidRequest, match="another spec"):
        engine.run(CreateModel(model_id="m", lora=LoraSpec(rank=5)))


def test_sleep_and_wake_up_come_back_bit_equal(engine: Engine) -> None:
    train(engine, some_datums())
    before = evaluate(engine, some_datums())
    engine.run(Sleep())
    with pytest.raises(Asleep, match="wake_up"):
        evaluate(engine, some_datums())
    engine.run(WakeUp())
    assert np.array_equal(before, evaluate(engine, some_datums()))
    engine.run(Sleep())
    engine.run(UnloadModel(model_id="m"))  # needs no weights, and its id must not stay taken
    engine.run(WakeUp())
    engine.run(CreateModel(model_id="m", lora=LoraSpec(rank=5)))


def test_running_out_of_memory_halves_the_batch(new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(max_batch_tokens=32)
    engine.run(CreateModel(model_id="m", lora=SPEC))
    batch = some_datums(lengths=(8, 8, 8, 8))
    command = ForwardBackward(model_id="m", datums=batch, loss=CrossEntropy(), token_mean=True)
    expected = engine.run(command)
    reference = gradients(engine)
    engine.models["m"].drop_gradient()
    sizes: list[int] = []
    hidden_states = engine.base.hidden_states

    def scarce(tokens: Tensor, *places: Any) -> Tensor:
        sizes.append(len(tokens))
        if len(tokens) > 16:
            raise torch.OutOfMemoryError("injected")
        return hidden_states(tokens, *places)

    monkeypatch.setattr(engine.base, "hidden_states", scarce)
    result = engine.run(command)
    np.testing.assert_allclose(floats(result.logprobs), floats(expected.logprobs), atol=1e-5)
    for name, grad in gradients(engine).items():
        torch.testing.assert_close(grad, reference[name], rtol=1e-4, atol=1e-4)
    assert max(sizes) == 32
    long = ForwardBackward(model_id="m", datums=some_datums(lengths=(20,)), loss=CrossEntropy(), token_mean=True)
    with pytest.raises(OutOfMemory, match="20 tokens"):
        engine.run(long)


def test_activation_checkpointing_changes_nothing(new_engine: NewEngine) -> None:
    results = []
    for setting in (False, True):
        engine = new_engine(activation_checkpointing=setting)
        engine.run(CreateModel(model_id="m", lora=SPEC))
        results.append(train(engine, some_datums(), steps=3))
    assert results[0] == results[1]


def test_bfloat16_trains_both_ways(new_engine: NewEngine) -> None:
    for full in (False, True):
        engine = new_engine(full=full, dtype="bfloat16")
        engine.run(CreateModel(model_id="default", lora=None if full else SPEC))
        batch = datums(random_sequences(np.random.default_rng(0), (12, 20)))
        losses = train(engine, batch, "default", steps=8)
        assert losses[-1] < losses[0] - 10
        parameters = engine.models["default"].parameters
        assert all(p.dtype == torch.float32 for p in parameters.values())


def test_importance_sampling_at_its_own_policy_has_ratio_one(engine: Engine) -> None:
    sequences = random_sequences(np.random.default_rng(4), (6, 9))
    logprobs = evaluate(engine, datums(sequences))
    parts = np.split(logprobs, [6])
    batch = datums(sequences, logprobs=parts, advantages=[np.ones(6), -np.ones(9)])
    result = engine.run(ForwardBackward(model_id="m", datums=batch, loss=ImportanceSampling(), token_mean=True))
    assert result.metrics["ratio_mean:mean"] == pytest.approx(1, abs=1e-6)
    assert result.metrics["kl_sample_train_k3:mean"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["loss:sum"] == pytest.approx(9 - 6, abs=1e-4)


@pytest.mark.parametrize("setting", [{"sliding_window": 8, "use_sliding_window": True}, {"logit_scale": 0.5}])
def test_a_model_that_computes_otherwise_is_refused_by_name(
    new_engine: NewEngine, tmp_path: Path, setting: dict[str, object]
) -> None:
    path = save_tiny_model(tmp_path / "other", "qwen2")
    config = json.loads((path / "config.json").read_text())
    del config["layer_types"]
    (path / "config.json").write_text(json.dumps({**config, "max_window_layers": 0, **setting}))
    with pytest.raises(InvalidRequest, match=str(path)):
        new_engine(model=str(path))
