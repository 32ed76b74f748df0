import pytest

from xorl.errors import InvalidRequest
from xorl.quantization import Fp8, read_fp8

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"weight_block_size": [128, 128]}, Fp8("block")),
        ({"weight_block_size": [128, 128], "fmt": "e4m3"}, Fp8("block")),
        ({}, Fp8("tensor")),
        ({"strategy": "channel"}, Fp8("channel")),
        ({"strategy": "block", "scale_fmt": "ue8m0"}, Fp8("block", power_of_two=True)),
        ({"modules_to_not_convert": ["lm_head", "x"]}, Fp8("tensor", not_converted=("lm_head", "x"))),
        ({"ignored_layers": ["x"], "modules_to_not_convert": None}, Fp8("tensor", not_converted=("x",))),
    ],
)
def test_what_a_config_says(config, expected):
    assert read_fp8(FP8 | config) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "awq"}, "quant_method: 'awq'"),
        ({"activation_scheme": "static"}, "activation_scheme: 'static'"),
        ({"weight_block_size": [1, 128]}, "weight_block_size: [1, 128]"),
        ({"strategy": "group"}, "strategy: 'group'"),
        ({"scale_fmt": "int"}, "scale_fmt: 'int'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: 'lm_head'"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert: [3]"),
    ],
)
def test_what_cannot_be_made_is_named(change, named):
    with pytest.raises(InvalidRequest) as caught:
        read_fp8(FP8 | change)
    assert str(caught.value).startswith(f"quantization.{named} is not ")


@pytest.mark.parametrize(
    ("module", "layer", "converts"),
    [
        ("lm_head", "lm_head", False),
        ("model.layers.0", "model.layers.0.mlp.up_proj", False),
        ("layers.0", "model.layers.0.mlp.up_proj", False),
        ("model.layers.1", "model.layers.10.mlp.up_proj", True),
        ("up_proj", "model.layers.0.mlp.up_proj", False),
        ("up", "model.layers.0.mlp.up_proj", True),
        ("mlp.up_proj", "model.layers.0.mlp.gate_proj", True),
    ],
)
def test_modules_are_left_out_by_whole_parts_of_their_path(module, layer, converts):
    assert Fp8(not_converted=(module,)).converts(layer) is converts
