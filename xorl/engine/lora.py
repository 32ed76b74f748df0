"""Attaches LoRA to the linear layers of a base model, for many adapters in one batch.

T: tokens of the batch; I, O: a layer's inputs and outputs; R: an adapter's rank.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xorl.errors import InvalidRequest
from xorl.types import LORA_PROJECTIONS, UNEMBEDDING, LoraSpec
from xorl_kernels.fused_lora import Segment, fused_lora


class LoraPair(NamedTuple):
    """One adapter's share of one layer."""

    a_RI: Tensor
    b_OR: Tensor


Adapter = Mapping[str, LoraPair]
"""Layer name, as the base model calls it, to the adapter's pair there."""


class Span(NamedTuple):
    """The consecutive tokens of a batch that belong to one adapter."""

    start: int
    stop: int
    adapter: Adapter
    scale: float


class Router:
    """Tells every LoRA layer which adapter each token of the running batch belongs to."""

    def __init__(self) -> None:
        self._spans: Sequence[Span] = ()

    @contextmanager
    def routing(self, spans: Sequence[Span]) -> Iterator[None]:
        """Apply `spans` to every forward inside; tokens outside all spans see the base model alone."""
        self._spans = spans
        try:
            yield
        finally:
            self._spans = ()

    def segments(self, layer: str) -> list[Segment]:
        return [
            Segment(span.start, span.stop, *span.adapter[layer], span.scale)
            for span in self._spans
            if layer in span.adapter
        ]


class LoraLinear(nn.Module):
    """A frozen linear layer plus whatever adapters the router names."""

    def __init__(self, base: nn.Linear, name: str, router: Router) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self._name, self._router = name, router

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, self.in_features)
        y_TO = fused_lora(x_TI, self.weight, self.bias, self._router.segments(self._name))
        return y_TO.view(*x.shape[:-1], self.out_features)


def attach(model: nn.Module) -> Router:
    """Put a LoraLinear in place of every projection of `model`; parameter names stay as they were."""
    router = Router()
    for name, module in list(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if leaf in LORA_PROJECTIONS and isinstance(module, nn.Linear):
            model.set_submodule(name, LoraLinear(module, name, router))
    return router


def layer_shapes(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) features of each layer that an adapter with these targets adapts.

    Raises:
        InvalidRequest: the model has no layer of one of these names.
    """
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear) and name.rpartition(".")[2] in targets
    }
    if UNEMBEDDING in targets:
        out_features, in_features = model.get_output_embeddings().weight.shape  # pyright: ignore[reportCallIssue]
        shapes[UNEMBEDDING] = (out_features, in_features)
    for target in targets:
        if not any(name.rpartition(".")[2] == target for name in shapes):
            raise InvalidRequest(f"target_modules: the base model has no linear layer called {target}")
    return shapes


def init_pairs(shapes: Mapping[str, tuple[int, int]], spec: LoraSpec, device: torch.device) -> dict[str, LoraPair]:
    """A new adapter that leaves the base model's outputs as they are: A uniform as in PEFT, B zero; float32."""
    generator = torch.Generator().manual_seed(spec.seed) if spec.seed is not None else None
    pairs = {}
    for name, (out_features, in_features) in shapes.items():
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), PEFT's choice
        a_RI = torch.empty(spec.rank, in_features).uniform_(-bound, bound, generator=generator)
        pairs[name] = LoraPair(
            a_RI.to(device).requires_grad_(), torch.zeros(out_features, spec.rank, device=device, requires_grad=True)
        )
    return pairs
