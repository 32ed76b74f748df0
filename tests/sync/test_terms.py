"""What a server is known to get wrong is refused before anything is sent, by name."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from xorl.quantization import Fp8
from xorl.sync.formats import Weight
from xorl.sync.receiver import ServerInfo
from xorl.sync.terms import Unfit, no_group, read_served, taken_form

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SIZES = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 64}
DENSE = LlamaConfig(**SIZES, intermediate_size=256, num_key_value_heads=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path, DENSE)


def save(folder: Path, config: LlamaConfig | Qwen3MoeConfig, quantization: object = None) -> Path:
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | ({"quantization_config": quantization} if quantization else {}))
    )
    return folder


def weights_of(folder: Path) -> list[Weight]:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    return [Weight(name, parameter, torch.bfloat16) for name, parameter in network.named_parameters()]


def form(folder: Path, asked: Fp8 | None = None, *, ranks: int = 1, blackwell: bool = False, **info: object):
    weights = weights_of(folder)
    said = ServerInfo(model_path=str(folder), **info)
    return taken_form(said, read_served(said.model_path), asked, weights, ranks=ranks, blackwell=blackwell)


def why(folder: Path, asked: Fp8 | None = None, **more: object) -> str:
    with pytest.raises(Unfit) as caught:
        form(folder, asked, **more)
    return str(caught.value)


@pytest.mark.parametrize("quantization", [None, "", "auto", "none"])
def test_a_plain_model_takes_plain_weights(folder, quantization):
    assert form(folder, quantization=quantization) is None


@pytest.mark.parametrize("said", [None, "fp8"])
def test_an_fp8_model_takes_the_form_of_its_config(folder, said):
    save(folder, DENSE, BLOCKS | {"modules_to_not_convert": ["model.layers.0.mlp"]})
    expected = Fp8("block", not_converted=("model.layers.0.mlp",))
    assert form(folder, quantization=said) == expected
    assert form(folder, expected) == expected
    assert "would be misread" in why(folder, Fp8("block")), "it converts other layers"
    assert "would be misread" in why(folder, Fp8("channel"))


def test_words_alone_make_no_difference(folder):
    save(folder, DENSE, BLOCKS | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"]})
    asked = Fp8("block", power_of_two=True, not_converted=("layers.0.mlp.up_proj",))
    assert form(folder, asked) == asked


def test_fp8_for_a_plain_model_is_refused(folder):
    assert "it serves plain weights, and FP8 (block" in why(folder, Fp8("block"))


def test_plain_weights_quantised_while_loading_are_refused(folder):
    assert "it cannot repeat online" in why(folder, quantization="fp8")


def test_other_quantisations_are_refused(folder):
    assert why(folder, quantization="awq").startswith("it serves awq weights")
    save(folder, DENSE, BLOCKS | {"activation_scheme": "static"})
    assert "its model config: quantization.activation_scheme" in why(folder)


def test_scales_that_servers_cannot_load_online_are_refused(folder):
    save(folder, DENSE, {"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert "a scale a tensor, which it cannot load online" in why(folder)


def test_fp8_and_lora_together_are_refused(folder):
    save(folder, DENSE, BLOCKS)
    assert "--enable-lora" in why(folder, enable_lora=True)
    save(folder, DENSE)
    assert form(folder, enable_lora=True) is None


@pytest.mark.parametrize(("backend", "fits"), [(None, False), ("auto", False), ("deep_gemm", False), ("triton", True)])
def test_repacked_scales_on_blackwell_are_refused(folder, backend, fits):
    save(folder, DENSE, BLOCKS)
    if fits:
        assert form(folder, blackwell=True, fp8_gemm_runner_backend=backend) == Fp8("block")
    else:
        assert "DeepGEMM repacks" in why(folder, blackwell=True, fp8_gemm_runner_backend=backend)


def test_blocks_that_servers_would_cut_are_refused(folder):
    save(folder, DENSE, BLOCKS)
    assert form(folder) == Fp8("block")
    assert why(folder, ranks=2, tp_size=2).startswith("model.layers.0.self_attn.k_proj.weight: 64 outputs a rank")
    wide = LlamaConfig(**SIZES | {"num_key_value_heads": 4}, intermediate_size=256)
    save(folder, wide, BLOCKS)
    assert form(folder, ranks=2, tp_size=2) == Fp8("block")
    save(folder, LlamaConfig(**SIZES, num_key_value_heads=4, intermediate_size=320), BLOCKS)
    assert why(folder).startswith("model.layers.0.mlp.gate_proj.weight: 320 outputs a rank")


def test_experts_are_whole_where_they_are_spread_over_ranks(tmp_path):
    config = Qwen3MoeConfig(
        **SIZES, num_key_value_heads=4, moe_intermediate_size=128, num_experts=4, intermediate_size=256
    )
    save(tmp_path, config, BLOCKS)
    assert form(tmp_path, ranks=2, tp_size=2, ep_size=2) == Fp8("block")
    assert "experts.0.gate_proj.weight: 64 outputs a rank" in why(tmp_path, ranks=2, tp_size=2)


def test_names_and_shapes_must_be_those_of_the_servers_model(folder, tmp_path):
    weights = weights_of(folder)
    served = read_served(str(folder))
    assert served is not None
    info = ServerInfo(model_path=str(folder))

    def refused(changed: list[Weight]) -> str:
        with pytest.raises(Unfit) as caught:
            taken_form(info, served, None, changed, ranks=1, blackwell=False)
        return str(caught.value)

    last = weights[-1]
    assert refused(weights[:-1]) == f"its model has {last.name}, which is not in this one and would stay as it is"
    assert "has no extra.weight" in refused([*weights, last._replace(name="extra.weight")])
    other = last._replace(tensor=torch.empty(2, 2, device="meta"))
    assert refused([*weights[:-1], other]) == f"{last.name}: its shape is [64, 256] there and [2, 2] here"


def test_a_tied_model_does_not_take_an_untied_one(folder):
    tied = LlamaConfig(**SIZES, intermediate_size=256, num_key_value_heads=2, tie_word_embeddings=True)
    untied_weights = weights_of(folder)
    save(folder, tied)
    served = read_served(str(folder))
    with pytest.raises(Unfit, match=r"^its model has no lm_head.weight"):
        taken_form(ServerInfo(model_path="m"), served, None, untied_weights, ranks=1, blackwell=False)


def test_the_number_of_ranks_must_be_known(folder):
    assert why(folder, ranks=1, tp_size=2) == "it has 2 tensor-parallel ranks; register it with world_size 2"


def test_where_no_config_is_readable_the_caller_is_believed(folder):
    weights, info = weights_of(folder), ServerInfo(model_path="/nowhere", quantization="fp8")
    assert read_served("/nowhere") is None
    assert read_served(None) is None
    assert taken_form(info, None, Fp8("block"), weights, ranks=1, blackwell=False) == Fp8("block")
    with pytest.raises(Unfit, match="say how they are quantised with set_sync_quantization"):
        taken_form(info, None, None, weights, ranks=1, blackwell=False)


def test_our_own_sampler_takes_every_form(folder):
    for asked in (None, Fp8("block"), Fp8("channel"), Fp8("tensor")):
        assert form(folder, asked, dequantizes=True) == asked


@pytest.mark.parametrize(
    ("info", "hindrance"),
    [
        ({"tp_size": 4, "device": "cpu"}, None),
        ({"dp_size": 2}, "it has 2 data-parallel replicas behind one address"),
        ({"dp_size": 2, "enable_dp_attention": True}, None),
        ({"pp_size": 2}, "it has 2 pipeline stages, whose ranks in the group would be the same"),
        ({"device": "cuda"}, "it is on cuda and we are on cpu"),
    ],
)
def test_who_cannot_join_an_update_group(info, hindrance):
    assert no_group(ServerInfo(**info), torch.device("cpu")) == hindrance
