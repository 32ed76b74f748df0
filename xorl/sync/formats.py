"""Says what goes on the wire for each weight of a model."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xorl.errors import InvalidRequest
from xorl.sync.plan import TensorSpec, WireDtype
from xorl.sync.receiver import ServerInfo

WIRE_DTYPES: dict[torch.dtype, WireDtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

UNQUANTIZED = ("", "auto", "none", "unquant")
"""What servers that hold plain weights say of their quantization."""

_STACKED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


class Weight(Protocol):
    """A full tensor under its Hugging Face name. Tied embeddings are one weight, the embedding."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def produce(self) -> Callable[[], Tensor]:
        """Makes the value that the weight has now, in its dtype and shape; the caller only reads it."""
        ...


def check_quantization(quantization: Mapping[str, object] | None) -> None:
    """Refuse a form in which weights cannot be sent."""
    if quantization is not None:
        raise InvalidRequest("quantization: FP8 sync is not available yet; leave it out to send weights as they are")


def wire_specs(weights: Sequence[Weight]) -> list[TensorSpec]:
    """What is sent: every weight as it is, one tensor each.

    Raises:
        InvalidRequest: naming a weight that no receiver would take. They answer 200 to a name they do not know.
    """
    return [_wire_spec(weight) for weight in weights]


def _wire_spec(weight: Weight) -> TensorSpec:
    dtype = WIRE_DTYPES.get(weight.dtype)
    if dtype is None:
        raise InvalidRequest(f"{weight.name}: {weight.dtype} cannot be synced; only {', '.join(WIRE_DTYPES.values())}")
    if _STACKED_EXPERTS.search(weight.name):
        raise InvalidRequest(f"{weight.name}: stacked experts cannot be synced yet; servers know them one by one")
    return TensorSpec(weight.name, dtype, tuple(weight.shape))


def refusal(info: ServerInfo, world_size: int) -> str | None:
    """Why a server cannot take plain weights into `world_size` ranks; None if it can."""
    if (info.quantization or "").lower() not in UNQUANTIZED:
        return (
            f"it serves {info.quantization} weights; plain ones would be cast without their scales. "
            "Start it without quantization"
        )
    if info.tp_size is not None and info.tp_size != world_size:
        return f"it has {info.tp_size} tensor-parallel ranks; register it with world_size {info.tp_size}"
    return None
