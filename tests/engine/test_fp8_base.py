"""A base that is held in FP8 trains as the model that its codes stand for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from builders import datums
from xorl.config import ConfigError
from xorl.engine.commands import CreateModel, Forward, ForwardBackward, ForwardResult, OptimStep, Sleep, WakeUp
from xorl.engine.engine import Engine
from xorl.engine.export import merged_tensors
from xorl.types import LORA_PROJECTIONS, AdamParams, CrossEntropy, LoraSpec
from xorl_kernels.fp8_quantize import dequantize, fp8_quantize, reference

BATCH = datums([[5, 17, 99, 3, 1], [42, 64, 8, 120]])


@pytest.fixture
def engines(tiny_model: Path, tmp_path: Path, new_engine: Callable[..., Engine]) -> list[Engine]:
    """One that holds FP8, and one that holds what the codes stand for; each has taken three steps."""
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, parameter in network.named_parameters():
        if name.split(".")[-2] in LORA_PROJECTIONS:
            parameter.data = dequantize(*fp8_quantize(parameter.detach()))
    network.save_pretrained(tmp_path / "meant")
    engines = [new_engine(fp8=True), new_engine(model=str(tmp_path / "meant"))]
    for engine in engines:
        engine.run(CreateModel(model_id="m", lora=LoraSpec(rank=4, seed=0)))
        for _ in range(3):
            engine.run(ForwardBackward(model_id="m", datums=BATCH, loss=CrossEntropy(), token_mean=True))
            engine.run(OptimStep(model_id="m", adam=AdamParams(learning_rate=1e-2)))
    return engines


def logprobs(engine: Engine) -> np.ndarray:
    result = engine.run(Forward(model_id="m", datums=BATCH, loss=CrossEntropy()))
    assert isinstance(result, ForwardResult)
    return np.frombuffer(result.logprobs, np.float32)


def test_training_is_the_same(engines: list[Engine]) -> None:
    held, meant = engines
    network = held.base.network
    assert network.get_parameter("model.layers.0.self_attn.q_proj.weight").dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(logprobs(held), logprobs(meant))


def test_merged_weights_are_the_same(engines: list[Engine]) -> None:
    def merged(engine: Engine) -> dict[str, Tensor]:
        weights = merged_tensors(engine.models["m"], engine.base)
        return {weight.name: reference.merge(weight.matrix(), weight.lora) for weight in weights}

    held, meant = map(merged, engines)
    assert held.keys() == meant.keys()
    assert all(torch.equal(held[name], meant[name]) for name in held)


def test_sleep_leaves_the_codes(engines: list[Engine]) -> None:
    before = logprobs(engines[0])
    engines[0].run(Sleep())
    engines[0].run(WakeUp())
    np.testing.assert_array_equal(logprobs(engines[0]), before)


def test_trained_codes_are_refused(new_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match="fp8 is for a frozen base"):
        new_engine(fp8=True, full=True)
