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
from xorl_kernels.fp8_quantize import fp8_quantize
from xorl_kernels.fused_lora import Base, Pair, Segment, fused_lora

Adapter = Mapping[str, Pair]
"""Layer name, as the base model calls it, to the adapter's pair there."""

OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read what their neighbours read, in the models of Hugging Face."""


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
        self.groups: list[LoraGroup] = []

    @contextmanager
    def routing(self, spans: Sequence[Span]) -> Iterator[None]:
        """Apply `spans` to every forward inside; tokens outside all spans see the base model alone."""
        self._spans = spans
        try:
            yield
        finally:
            self._spans = ()
            for group in self.groups:
                group.forget()

    def segments(self, layers: Sequence[str]) -> list[Segment]:
        return [
            Segment(span.start, span.stop, tuple(span.adapter.get(layer) for layer in layers), span.scale)
            for span in self._spans
        ]

    def restack(self) -> None:
        """To be called when the network's weights have moved."""
        for group in self.groups:
            group.stack()


class LoraGroup:
    """Linear layers of one input, such as q, k and v: the first that is called computes all."""

    def __init__(self, layers: Mapping[str, nn.Linear], router: Router, *, fp8: bool) -> None:
        self.members = [LoraLinear(layer, self, index, fp8=fp8) for index, layer in enumerate(layers.values())]
        self._names, self._router = tuple(layers), router
        self.stack()
        self.forget()

    def stack(self) -> None:
        """Lay the members' weights into one matrix, of which each becomes a part."""
        sizes = tuple(member.out_features for member in self.members)
        biases = [member.bias for member in self.members if member.bias is not None]
        weight_OI = _stacked([member.weight for member in self.members])
        scales = tuple(member.scales for member in self.members if member.scales is not None)
        self._stacked = Base(weight_OI, _stacked(biases) if biases else None, sizes, scales)

    @property
    def _base(self) -> Base:
        """A layer alone is asked for its weights each time: sharded ones are whole only while it computes."""
        first, *others = self.members
        return self._stacked if others else self._stacked._replace(weight_OI=first.weight, bias_O=first.bias)

    def output(self, index: int, x: Tensor) -> Tensor:
        """[..., O] of one member; the others' are kept until they are asked for."""
        if x is not self._x or index not in self._outputs:
            segments = self._router.segments(self._names)
            self._x, self._outputs = x, dict(enumerate(fused_lora(x.reshape(-1, x.shape[-1]), self._base, segments)))
        y_TO = self._outputs.pop(index)
        if not self._outputs:
            self.forget()
        return y_TO.view(*x.shape[:-1], -1)

    def forget(self) -> None:
        self._x: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}


class LoraLinear(nn.Module):
    """A frozen linear layer plus whatever adapters the router names; in FP8 its weight is e4m3 codes with `scales`."""

    scales: Tensor | None

    def __init__(self, base: nn.Linear, group: LoraGroup, index: int, *, fp8: bool) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.register_buffer("scales", None, persistent=False)
        if fp8:
            codes_OI, self.scales = fp8_quantize(base.weight.detach())
            self.weight = nn.Parameter(codes_OI, requires_grad=False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._group, self._index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return self._group.output(self._index, x)


def attach(model: nn.Module, *, fp8: bool = False, together: bool = True) -> Router:
    """Put a LoraLinear in place of every projection of `model`; parameter names stay as they were.

    Without `together` every layer computes by itself, and keeps its own weights.
    """
    router = Router()
    for parent_name, parent in list(model.named_modules()):
        linears = {
            leaf: layer for leaf in LORA_PROJECTIONS if isinstance(layer := getattr(parent, leaf, None), nn.Linear)
        }
        for leaves in _grouped(linears) if together else [(leaf,) for leaf in linears]:
            layers = {f"{parent_name}.{leaf}": linears[leaf] for leaf in leaves}
            group = LoraGroup(layers, router, fp8=fp8)
            router.groups.append(group)
            for name, member in zip(layers, group.members, strict=True):
                model.set_submodule(name, member)
    return router


def _grouped(linears: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Neighbours of one input together, if they are all there and alike; the others alone."""
    together = [
        leaves
        for leaves in OF_ONE_INPUT
        if linears.keys() >= set(leaves)
        and len({(linears[leaf].in_features, linears[leaf].bias is None) for leaf in leaves}) == 1
    ]
    return together + [(leaf,) for leaf in linears if not any(leaf in leaves for leaves in together)]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """One tensor, which the parts become views of."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole


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


def init_pairs(shapes: Mapping[str, tuple[int, int]], spec: LoraSpec, device: torch.device) -> dict[str, Pair]:
    """A new adapter that leaves the base model's outputs as they are: A uniform as in PEFT, B zero; float32."""
    generator = torch.Generator().manual_seed(spec.seed) if spec.seed is not None else None
    pairs = {}
    for name, (out_features, in_features) in shapes.items():
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), PEFT's choice
        a_RI = torch.empty(spec.rank, in_features).uniform_(-bound, bound, generator=generator)
        pairs[name] = Pair(
            a_RI.to(device).requires_grad_(), torch.zeros(out_features, spec.rank, device=device, requires_grad=True)
        )
    return pairs
