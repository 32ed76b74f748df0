"""Reads of Hugging Face's quantization_config what FP8 weights look like."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from xorl.errors import InvalidRequest

Form = Literal["block", "channel", "tensor"]

BLOCK = [128, 128]

_SUPPORTED: dict[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "activation_scheme": (None, "dynamic"),
    "weight_block_size": (None, BLOCK),
    "strategy": (None, "block", "channel", "tensor"),
    "scale_fmt": (None, "float", "ue8m0"),
}


class Fp8(msgspec.Struct, frozen=True):
    """Linear layers as e4m3 codes with float32 scales, w = code · scale.

    Attributes:
        form: a scale each 128 × 128 block, each output channel, or one a weight.
        power_of_two: scales are powers of two.
        not_converted: modules that stay as they are, with all that they hold.
    """

    form: Form = "block"
    power_of_two: bool = False
    not_converted: tuple[str, ...] = ()

    def converts(self, layer: str) -> bool:
        """Whether a linear layer has codes. Modules match as in SGLang: any run of whole parts of the path."""
        path = f".{layer}."
        return not any(f".{module.strip('.').removeprefix('model.')}." in path for module in self.not_converted)


def read_fp8(config: Mapping[str, object]) -> Fp8:
    """Without weight_block_size a weight has one scale, unless `strategy`, compressed-tensors' word, says otherwise.

    Raises:
        InvalidRequest: naming the field that asks for something else than we can make.
    """
    for field, values in _SUPPORTED.items():
        if config.get(field) not in values:
            names = ", ".join(repr(value) for value in values if value is not None)
            raise InvalidRequest(f"quantization.{field}: {config.get(field)!r} is not supported, only {names}")
    modules = config.get("modules_to_not_convert") or config.get("ignored_layers") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise InvalidRequest(f"quantization.modules_to_not_convert: {modules!r} is not a list of names")
    default = "tensor" if config.get("weight_block_size") is None else "block"
    return msgspec.convert(
        {
            "form": config.get("strategy") or default,
            "power_of_two": config.get("scale_fmt") == "ue8m0",
            "not_converted": modules,
        },
        Fp8,
    )
