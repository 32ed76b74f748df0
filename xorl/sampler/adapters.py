"""Reads LoRA adapters from PEFT's folders."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from xorl.engine.lora import Pair, layer_shapes
from xorl.errors import InvalidRequest
from xorl.types import LORA_PROJECTIONS, UNEMBEDDING

MAX_LORA_RANK = 512
_PREFIX = "base_model.model."


class LoadedAdapter(msgspec.Struct, frozen=True, eq=False):
    """Weights of one load; a row keeps its own reference, so that unloading never disturbs a running row."""

    name: str
    path: str
    pairs: dict[str, Pair]
    scale: float


class PeftConfig(msgspec.Struct, frozen=True):
    """What is read of adapter_config.json; whatever would change the arithmetic must be at rest."""

    r: int
    lora_alpha: float
    peft_type: Literal["LORA"] = "LORA"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.r <= MAX_LORA_RANK:
            raise ValueError(f"r is {self.r}, not between 1 and {MAX_LORA_RANK}")
        for field in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if getattr(self, field):
                raise ValueError(f"{field} is not supported")

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def load_adapter(name: str, path: Path, model: nn.Module, device: torch.device) -> LoadedAdapter:
    """Read one adapter for `model`, whose projections are LoraLinear.

    Raises:
        InvalidRequest: naming the file and what in it does not fit.
    """
    try:
        config = msgspec.json.decode((path / "adapter_config.json").read_bytes(), type=PeftConfig)
        tensors = load_file(path / "adapter_model.safetensors")
    except (OSError, msgspec.DecodeError, SafetensorError, json.JSONDecodeError) as error:
        raise InvalidRequest(f"LoRA adapter {name} at {path}: {error}") from error
    shapes = layer_shapes(model, (*LORA_PROJECTIONS, UNEMBEDDING))
    try:
        pairs = _pair_up(tensors, shapes, config.r)
    except ValueError as error:
        raise InvalidRequest(f"LoRA adapter {name} at {path}: {error}") from error
    on_device = {layer: Pair(*(factor.to(device, torch.float32) for factor in pair)) for layer, pair in pairs.items()}
    return LoadedAdapter(name, str(path), on_device, config.scale)


def _pair_up(tensors: dict[str, Tensor], shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, Pair]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key == f"{_PREFIX}{UNEMBEDDING}.base_layer.weight":
            continue  # PEFT saves the head beside an adapter on it, unchanged since modules_to_save is refused
        layer, _, side = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(_PREFIX) or layer not in shapes or side not in ("lora_A", "lora_B"):
            raise ValueError(f"tensor {key} adapts nothing in this model")
        out_features, in_features = shapes[layer]
        wanted = (rank, in_features) if side == "lora_A" else (out_features, rank)
        if tensor.shape != wanted:
            raise ValueError(f"tensor {key} has shape {list(tensor.shape)}, not {list(wanted)}")
        sides.setdefault(layer, {})[side] = tensor
    lone = [layer for layer, pair in sides.items() if len(pair) != 2]
    if lone or not sides:
        raise ValueError(f"lora_A or lora_B is missing for {lone[0]}" if lone else "it holds no tensors")
    return {layer: Pair(pair["lora_A"], pair["lora_B"]) for layer, pair in sides.items()}
