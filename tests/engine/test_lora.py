"""xorl.engine.lora on tiny models, with PEFT as the peer.

T: tokens; I, O: a layer's inputs and outputs; R: an adapter's rank.
"""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from xorl.engine.lora import Adapter, Pair, Span, attach, init_pairs, layer_shapes
from xorl.types import LORA_PROJECTIONS, LoraSpec

torch.set_num_threads(1)

CPU = torch.device("cpu")
TOKENS_T = torch.arange(3, 20)
ARCHS = ("llama", "qwen2", "qwen3")


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)


def random_adapter(model: nn.Module, rank: int, seed: int, targets: tuple[str, ...] = LORA_PROJECTIONS) -> Adapter:
    """An adapter as training would leave it: B is not zero."""
    pairs = init_pairs(layer_shapes(model, targets), LoraSpec(rank=rank, seed=seed), CPU)
    generator = torch.Generator().manual_seed(seed + 1000)
    return {
        name: Pair(a_RI, (torch.randn(b_OR.shape, generator=generator) / 4).requires_grad_())
        for name, (a_RI, b_OR) in pairs.items()
    }


def logits(model: nn.Module, tokens_T: Tensor = TOKENS_T) -> Tensor:
    return model(input_ids=tokens_T[None]).logits[0]


def as_peft(model: PreTrainedModel, adapter: Adapter, rank: int, alpha: float) -> peft.PeftModel:
    targets = sorted({name.rpartition(".")[2] for name in adapter})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    weights = {}
    for name, (a_RI, b_OR) in adapter.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = a_RI.detach().clone()
        weights[f"base_model.model.{name}.lora_B.weight"] = b_OR.detach().clone()
    outcome = peft.set_peft_model_state_dict(wrapped, weights)
    assert not outcome.unexpected_keys
    return wrapped


@pytest.mark.parametrize("arch", ARCHS)
def test_every_projection_is_adapted_and_names_stay(tiny_models, arch):
    model = load(tiny_models[arch])
    names = {name for name, _ in model.named_parameters()}
    attach(model)
    shapes = layer_shapes(model, LORA_PROJECTIONS)
    assert {name for name, _ in model.named_parameters()} == names
    assert len(shapes) == 2 * len(LORA_PROJECTIONS)
    assert all(tuple(model.get_parameter(f"{name}.weight").shape) == shape for name, shape in shapes.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_b_zero_is_the_base_model(tiny_models, arch):
    model = load(tiny_models[arch])
    base = logits(model)
    router = attach(model)
    assert torch.equal(logits(model), base)
    fresh = init_pairs(layer_shapes(model, LORA_PROJECTIONS), LoraSpec(rank=4), CPU)
    with router.routing([Span(0, len(TOKENS_T), fresh, 8.0)]):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("targets", [LORA_PROJECTIONS, ("q_proj", "down_proj")])
def test_values_and_gradients_are_pefts(tiny_models, arch, targets):
    rank, alpha = 4, 6.0
    model = load(tiny_models[arch])
    router = attach(model)
    adapter = random_adapter(model, rank, 0, targets)
    with router.routing([Span(0, len(TOKENS_T), adapter, alpha / rank)]):
        ours = logits(model)
        ours.square().mean().backward()

    wrapped = as_peft(load(tiny_models[arch]), adapter, rank, alpha)
    theirs = logits(wrapped)
    theirs.square().mean().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(load(tiny_models[arch])), atol=1e-2)
    for name, pair in adapter.items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        for mine, peers in ((pair.a_RI, layer.lora_A.default.weight), (pair.b_OR, layer.lora_B.default.weight)):
            torch.testing.assert_close(mine.grad, peers.grad, rtol=1e-3, atol=1e-5)


def test_adapters_of_one_batch_do_not_mix(tiny_model):
    """Two adapters and the base model, on three segments: a linear layer gives each token what it gets alone."""
    model = load(tiny_model)
    router = attach(model)
    first, second = random_adapter(model, 4, 1), random_adapter(model, 8, 2)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x_TI = torch.randn(12, 64)
    with router.routing([Span(0, 5, first, 1.0), Span(8, 12, second, 0.5)]):
        together_TO = layer(x_TI)
    for rows, spans in (
        (slice(0, 5), [Span(0, 12, first, 1.0)]),
        (slice(5, 8), []),
        (slice(8, 12), [Span(0, 12, second, 0.5)]),
    ):
        with router.routing(spans):
            torch.testing.assert_close(together_TO[rows], layer(x_TI)[rows], rtol=1e-6, atol=1e-6)


def test_routing_ends_with_its_block_even_on_an_error(tiny_model):
    model = load(tiny_model)
    base = logits(model)
    router = attach(model)
    adapter = random_adapter(model, 4, 3)

    def fail() -> None:
        with router.routing([Span(0, len(TOKENS_T), adapter, 1.0)]):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(logits(model), base)


def test_the_unembedding_is_a_layer_when_asked_for(tiny_model):
    model = load(tiny_model)
    attach(model)
    assert layer_shapes(model, ("lm_head",)) == {"lm_head": (128, 64)}


def test_one_seed_one_adapter(tiny_model):
    model = load(tiny_model)
    attach(model)
    shapes = layer_shapes(model, LORA_PROJECTIONS)
    one, same, other = (init_pairs(shapes, LoraSpec(rank=4, seed=seed), CPU) for seed in (5, 5, 6))
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(one[name].a_RI, same[name].a_RI)
    assert not torch.equal(one[name].a_RI, other[name].a_RI)
    assert not one[name].b_OR.any()
    assert one[name].a_RI.abs().max() <= 1 / 64**0.5
