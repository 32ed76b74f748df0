"""Turns what is trained into full tensors under their Hugging Face names, LoRA merged, one at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xorl.engine.adapters import SIDES, TrainedModel
from xorl.engine.model import BaseModel
from xorl.engine.parallel import whole
from xorl.errors import InvalidRequest
from xorl.types import UNEMBEDDING


@dataclass(frozen=True)
class Exported:
    """A tensor that inference servers know by `name`; `produce` makes its current value, in `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Tensor]


def merged_tensors(model: TrainedModel, base: BaseModel) -> list[Exported]:
    """Every weight of the model, in the order of the network; W + scale · B A where an adapter acts.

    Tied embeddings go once, as the embedding.

    Raises:
        InvalidRequest: the adapter trains the unembedding of a model whose embeddings are tied, so that merged weights
            have no place for it.
    """
    if UNEMBEDDING in (model.spec.target_modules if model.spec else ()) and base.tied:
        raise InvalidRequest(
            "target_modules: lm_head is trained but the base model ties it to the embedding, so merged weights cannot "
            "hold it; sync the adapter itself (create_sampling_session) or train without lm_head"
        )
    return [
        Exported(name, base.dtype, tuple(weight.shape), _producer(name, weight, model, base.dtype))
        for name, weight in base.network.named_parameters()
    ]


def _producer(name: str, weight: Tensor, model: TrainedModel, dtype: torch.dtype) -> Callable[[], Tensor]:
    layer = name.removesuffix(".weight")
    if model.spec is None or f"{layer}.{SIDES[0]}" not in model.parameters:
        return lambda: whole(weight).detach().to(dtype)
    scale = model.spec.scale
    a_RI, b_OR = model.pair(layer)

    def merge() -> Tensor:
        return torch.addmm(whole(weight).float(), b_OR, a_RI, alpha=scale).detach().to(dtype)

    return merge


def whole_state(base: BaseModel) -> dict[str, Tensor]:
    """The network's own weights, in CPU memory of the first rank; empty on the others, who are to ask for it too."""
    state = {}
    for name, tensor in base.network.state_dict().items():
        full = whole(tensor)
        if base.ranks.is_first:
            state[name] = full.cpu()
    return state
