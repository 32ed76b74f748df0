"""Says in which form each weight of a model travels."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xorl.errors import InvalidRequest
from xorl.quantization import Form, Fp8
from xorl.sync.plan import Bucket, Item, TensorSpec, WireDtype
from xorl.types import LORA_PROJECTIONS
from xorl_kernels.fp8_quantize import Lora, Piece, ToBfloat16, ToFloat32, ToFp8, dequantize, scale_shape

WIRE_DTYPES: dict[torch.dtype, WireDtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

SCALE_SUFFIX: dict[Form, str] = {"block": "_scale_inv", "channel": "_scale", "tensor": "_scale"}
"""What follows the weight's name in that of its scales. They multiply, whatever the first one says."""

NEVER_QUANTIZED = ("embed_tokens", "lm_head", "gate")
"""Matrices that no server quantises: the embeddings and a mixture's router."""

_STACKED_EXPERTS = re.compile(r"(?P<experts>.*\.experts)\.(?P<part>gate_up_proj|down_proj)")


class Weight(NamedTuple):
    """A full tensor under its Hugging Face name and the adapter that acts on it; `dtype` is that of a checkpoint.

    Tied embeddings are one weight, the embedding. Tensors are read when a bucket is made, which is on their own device
    or the one given. One that is held in FP8 comes with the `scales` of its blocks.
    """

    name: str
    tensor: Tensor
    dtype: torch.dtype
    lora: Lora | None = None
    scales: Tensor | None = None
    device: torch.device | None = None

    @property
    def held_dtype(self) -> torch.dtype:
        """In which its values can be read."""
        return self.tensor.dtype if self.scales is None else torch.float32

    def matrix(self) -> Tensor:
        """The values. An adapter is merged into what the training forward multiplies with, codes rounded to `dtype`."""
        values = self.tensor.detach().to(self.device)
        if self.scales is not None:
            plain = torch.empty_like(values, dtype=torch.float32 if self.lora is None else self.dtype)
            values = dequantize(values, self.scales, plain)
        return values.view(-1, values.shape[-1]) if values.dim() > 1 else values.view(1, -1)


def one_by_one(weights: Sequence[Weight]) -> list[Weight]:
    """The weights as servers know them: experts that transformers stacks, [E, 2I, H] and [E, H, I], each for itself."""
    separate: list[Weight] = []
    for weight in weights:
        match = _STACKED_EXPERTS.fullmatch(weight.name)
        separate += [weight] if match is None else _experts(weight, match)
    return separate


def _experts(weight: Weight, match: re.Match[str]) -> list[Weight]:
    names = ("down_proj",) if match["part"] == "down_proj" else ("gate_proj", "up_proj")
    return [
        weight._replace(name=f"{match['experts']}.{index}.{name}.weight", tensor=part)
        for index, expert in enumerate(weight.tensor)
        for name, part in zip(names, expert.chunk(len(names)), strict=True)
    ]


def wire_items(weights: Sequence[Weight], fp8: Fp8 | None) -> list[Item]:
    """What is sent of each weight: codes and scales of the linear layers if `fp8`, the others as they are.

    In the order of the weights, but the embedding comes last: nothing would hide how so large a beginning is produced.

    Raises:
        InvalidRequest: naming a weight that no receiver would take. They answer 200 to a name they do not know.
    """
    return [_wire_item(weight, fp8) for weight in sorted(weights, key=_is_embedding)]


def _is_embedding(weight: Weight) -> bool:
    return weight.name.endswith("embed_tokens.weight")


def _wire_item(weight: Weight, fp8: Fp8 | None) -> Item:
    name, shape = weight.name, tuple(weight.tensor.shape)
    dtype = WIRE_DTYPES.get(weight.dtype)
    if dtype is None or weight.held_dtype not in WIRE_DTYPES:
        wrong = weight.held_dtype if dtype else weight.dtype
        raise InvalidRequest(f"{name}: {wrong} cannot be synced; only {', '.join(WIRE_DTYPES.values())}")
    if fp8 is None or not is_quantized(weight, fp8):
        return Item(TensorSpec(name, dtype, shape))
    rows, cols = shape
    scales = TensorSpec(name + SCALE_SUFFIX[fp8.form], "float32", scale_shape(rows, cols, fp8.form))
    return Item(TensorSpec(name, "float8_e4m3fn", shape), scales)


def is_quantized(weight: Weight, fp8: Fp8) -> bool:
    """Whether servers hold codes of it.

    Raises:
        InvalidRequest: nobody told us; to guess wrong is to send garbage.
    """
    layer, _, kind = weight.name.rpartition(".")
    leaf = layer.rpartition(".")[2]
    if kind != "weight" or weight.tensor.dim() != 2 or leaf in NEVER_QUANTIZED or not fp8.converts(layer):
        return False
    if leaf not in LORA_PROJECTIONS:
        known = ", ".join(LORA_PROJECTIONS)
        raise InvalidRequest(f"{weight.name}: whether servers quantise it is not known, only of {known}")
    return True


def pieces(bucket: Bucket, weights: Mapping[str, Weight], fp8: Fp8 | None) -> list[Piece]:
    """What packs the bucket."""
    offsets = bucket.offsets
    return [_piece(item, weights[item.values.name], offsets, fp8) for item in bucket.items]


def _piece(item: Item, weight: Weight, offsets: Mapping[str, int], fp8: Fp8 | None) -> Piece:
    name, offset, matrix = weight.name, offsets[weight.name], weight.matrix()
    if item.scales is not None:
        assert fp8 is not None
        scale_offset = offsets[item.scales.name]
        return ToFp8(name, matrix, offset, scale_offset, fp8.form, fp8.power_of_two, weight.lora)
    kind = ToBfloat16 if item.values.dtype == "bfloat16" else ToFloat32
    return kind(name, matrix, offset, weight.lora)
