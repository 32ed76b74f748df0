"""Keeps what is trained for each model_id: weights, AdamW's moments and the accumulated gradient.

A model that is not resident has its tensors in CPU memory (CUDA) or in a file (CPU).
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from xorl.engine.lora import Adapter, Pair, init_pairs, layer_shapes
from xorl.engine.model import BaseModel
from xorl.engine.parallel import is_sharded, local, parted_like
from xorl.engine.ranks import Ranks
from xorl.errors import InvalidRequest, StorageFull, UnknownId
from xorl.types import AdamParams, LoraSpec

SIDES = ("lora_A", "lora_B")
"""What PEFT calls the two halves of a pair."""


class Gradient(NamedTuple):
    """A gradient of all weights. What runs with `adapter` adds to it: leaves that share the weights' memory."""

    tensors: list[Tensor]
    adapter: Adapter


class TrainedModel:
    """What one model_id trains: an adapter, or with `spec` None the network's own weights; float32 masters.

    An adapter's weights lie in one tensor, and so do its gradient and moments, so that a step is a few launches.
    Nothing here but `num_steps` waits for the device.

    Attributes:
        parameters: the weights by name; for an adapter, parts of its one tensor.
        adapter: the pairs of those parts by layer; empty for full weights.
        gradient: accumulated since the last step; None if no request asked for one.
        num_requests: int64 [], how many requests' gradients are in it.
        num_mean_tokens: int64 [], their valid tokens, of those that ask for a token mean.
    """

    def __init__(self, spec: LoraSpec | None, parameters: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.parameters = dict(parameters)
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._weights = [local(parameter) for parameter in parameters.values()]
        self._sharded = [is_sharded(parameter) for parameter in parameters.values()]
        if spec is not None:
            self._weights, self._sharded = [torch.cat([weight.detach().flatten() for weight in self._weights])], [False]
        self.reset()
        self.bind()

    @classmethod
    def lora(cls, spec: LoraSpec, base: BaseModel) -> "TrainedModel":
        pairs = init_pairs(layer_shapes(base.network, spec.target_modules), spec, base.device)
        parameters: dict[str, Tensor] = {}
        for layer, pair in pairs.items():
            parameters |= {f"{layer}.{side}": tensor for side, tensor in zip(SIDES, pair, strict=True)}
        return cls(spec, parameters)

    @classmethod
    def full(cls, base: BaseModel) -> "TrainedModel":
        return cls(None, dict(base.network.named_parameters()))

    def reset(self) -> None:
        """Drop the gradient and start the optimizer anew."""
        self.drop_gradient()
        self._steps = [torch.zeros((), device=weights.device) for weights in self._weights]
        self._moments: tuple[list[Tensor], list[Tensor]] | None = None

    def drop_gradient(self) -> None:
        device = self._weights[0].device
        self.gradient: Gradient | None = None
        self.num_requests, self.num_mean_tokens = torch.zeros((2,), dtype=torch.int64, device=device).unbind()

    def pair(self, layer: str) -> Pair:
        return Pair(*(self.parameters[f"{layer}.{side}"] for side in SIDES))

    def new_gradient(self) -> Gradient:
        """Zeros for the backward of one request. Full weights have one at a time: it goes to the network's .grad."""
        if self.spec is None:
            for parameter in self.parameters.values():
                parameter.grad = None
            return Gradient([], {})
        gradient, self._spare = self._spare or self._new_leaves(), None
        gradient.tensors[0].zero_()
        return gradient

    def _new_leaves(self) -> Gradient:
        flat = torch.empty_like(self._weights[0])
        leaves = {}
        for name, part in self._named([flat]).items():
            leaves[name] = self.parameters[name].detach().requires_grad_()
            leaves[name].grad = part
        return Gradient([flat], _pairs(leaves))

    def add(self, gradient: Gradient, finite: Tensor, num_mean_tokens: int) -> None:
        """Add a request's gradient, which is the model's from now on, to the accumulated one.

        Args:
            finite: bool []; where false, the request leaves nothing.
            num_mean_tokens: its valid tokens if it asks for a token mean, else 0.
        """
        if self.spec is None:
            gradient = Gradient([_taken_gradient(parameter) for parameter in self.parameters.values()], {})
        for tensor in gradient.tensors:
            tensor.masked_fill_(~finite, 0)
        self.num_requests = self.num_requests + finite
        self.num_mean_tokens = self.num_mean_tokens + finite * num_mean_tokens
        if self.gradient is None:
            self.gradient = gradient
        else:
            torch._foreach_add_(self.gradient.tensors, gradient.tensors)
            self._spare = gradient if gradient.adapter else None

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated gradient by name; empty if there is none."""
        return self._named(self.gradient.tensors) if self.gradient else {}

    def optim_step(self, adam: AdamParams, ranks: Ranks) -> Tensor:
        """One AdamW step on the gradient that all ranks have accumulated, which it uses up.

        The weights stay as they are if that gradient is NaN or infinite, or no request is in it.

        Returns:
            [3] float64: the gradient's L2 norm before clipping, the number of requests in it, the steps taken so far.
        """
        gradient, num_requests, num_mean_tokens = self.gradient, self.num_requests, self.num_mean_tokens
        norm = torch.zeros_like(self._steps[0])
        if gradient is not None:
            norm, factor = _clipped(self._summed_norm(gradient.tensors, ranks), num_mean_tokens, adam.grad_clip_norm)
            torch._foreach_mul_(gradient.tensors, factor)
            self._adamw(gradient.tensors, adam, skip=~norm.isfinite() | (num_requests == 0))
            self._spare = gradient if gradient.adapter else None
            self.drop_gradient()
        return torch.stack([norm.double(), num_requests.double(), self._steps[0].double()])

    def _summed_norm(self, gradients: list[Tensor], ranks: Ranks) -> Tensor:
        """Sum what each rank has of the gradients, apart from those of shards, which are sums; their L2 norm."""
        by_kind: dict[bool, list[Tensor]] = {False: [], True: []}
        for gradient, sharded in zip(gradients, self._sharded, strict=True):
            by_kind[sharded].append(gradient)
        ranks.sum(by_kind[False])
        norm = get_total_norm(by_kind[False])
        if not by_kind[True]:
            return norm
        square = get_total_norm(by_kind[True]).square()
        ranks.sum([square])
        return (norm.square() + square).sqrt()

    def _adamw(self, gradients: list[Tensor], adam: AdamParams, skip: Tensor) -> None:
        averages, squares = self._made_moments()
        with torch.no_grad():
            adamw(
                self._weights,
                gradients,
                averages,
                squares,
                [],
                self._steps,
                fused=True,
                found_inf=skip.float(),
                amsgrad=False,
                maximize=False,
                lr=adam.learning_rate,
                beta1=adam.beta1,
                beta2=adam.beta2,
                eps=adam.eps,
                weight_decay=adam.weight_decay,
            )

    def _made_moments(self) -> tuple[list[Tensor], list[Tensor]]:
        if self._moments is None:
            averages, squares = ([torch.zeros_like(w, requires_grad=False) for w in self._weights] for _ in range(2))
            self._moments = averages, squares
        return self._moments

    @property
    def num_steps(self) -> int:
        return int(self._steps[0])

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments and step count by parameter name, zeros where no step was taken yet."""
        averages, squares = self._made_moments()
        steps = dict(zip(self._shapes, itertools.cycle(self._steps), strict=False))
        moments = {"exp_avg": self._named(averages), "exp_avg_sq": self._named(squares), "step": steps}
        return {f"{key}.{name}": tensor for key, named in moments.items() for name, tensor in named.items()}

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors laid out like the weights, by parameter name; sharded where the parameters are."""
        if self.spec is None:
            whole = self.parameters.items()
            return {name: parted_like(part, parameter) for part, (name, parameter) in zip(tensors, whole, strict=True)}
        parts = tensors[0].split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory; whoever assigns to their `.data` brackets it with `unbind` and `bind`."""
        gradient = self.gradient.tensors if self.gradient else []
        return [*self._weights, *gradient, *itertools.chain(*(self._moments or ()))]

    def unbind(self) -> None:
        """Let go of all views into the tensors."""
        self._spare: Gradient | None = None
        self.adapter: Adapter = {}
        if self.spec is not None:
            self.parameters = {}
        if self.gradient is not None:
            self.gradient = Gradient(self.gradient.tensors, {})

    def bind(self) -> None:
        """Name the parts of the weights where they are now."""
        self.unbind()
        if self.spec is not None:
            self.parameters = self._named(self._weights)
            self.adapter = _pairs(self.parameters)
        else:
            self._weights = [local(parameter) for parameter in self.parameters.values()]


def _pairs(parameters: Mapping[str, Tensor]) -> Adapter:
    layers = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return {layer: Pair(*(parameters[f"{layer}.{side}"] for side in SIDES)) for layer in layers}


def _taken_gradient(weight: Tensor) -> Tensor:
    gradient, weight.grad = weight.grad, None
    return torch.zeros_like(local(weight)) if gradient is None else local(gradient)


def _clipped(norm: Tensor, num_mean_tokens: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of the mean gradient before clipping, from the summed one's; and what to multiply that with.

    max_norm 0: no limit.
    """
    scale = num_mean_tokens.clamp(min=1).reciprocal()
    norm = norm * scale
    return norm, scale * (max_norm / (norm + 1e-6)).clamp(max=1) if max_norm > 0 else scale


class TrainedModels:
    """All models of the server by id; at most `max_resident` are on the device, the least recently used leave."""

    def __init__(self, base: BaseModel, max_resident: int, spill_dir: Path) -> None:
        self._base = base
        self._max_resident = max_resident
        self._spill_dir = spill_dir
        self._resident: OrderedDict[str, TrainedModel] = OrderedDict()
        self._evicted: dict[str, TrainedModel] = {}
        self._created = 0
        self._files: dict[str, Path] = {}

    def create(self, model_id: str, spec: LoraSpec | None) -> None:
        """Start a model; an id that exists is left as it is when the specs agree."""
        if (spec is None) != self._base.full:
            raise InvalidRequest(
                "lora_config: this server trains full weights" if self._base.full else "lora_config: missing"
            )
        existing = self._resident.get(model_id) or self._evicted.get(model_id)
        if existing is None:
            self._make_room()
            model = TrainedModel.full(self._base) if spec is None else TrainedModel.lora(spec, self._base)
            if spec is not None:
                self._base.ranks.copy_first(model.tensors())  # without a seed each has started elsewhere
            self._resident[model_id] = model
        elif existing.spec != spec:
            raise InvalidRequest(f"model_id {model_id} exists with another spec: {existing.spec}")

    def __getitem__(self, model_id: str) -> TrainedModel:
        """The model, brought back to the device if it was evicted."""
        if model_id in self._evicted:
            self._bring_back(model_id)
        if model_id not in self._resident:
            raise UnknownId(f"model_id {model_id} is not registered; there are {sorted(self.ids())}")
        self._resident.move_to_end(model_id)
        return self._resident[model_id]

    def touch(self, model_ids: Iterable[str]) -> None:
        """Count as used, so that bringing back one of them evicts none of the others while there is room for all."""
        for model_id in model_ids:
            if model_id in self._resident:
                self._resident.move_to_end(model_id)

    def remove(self, model_id: str) -> None:
        if model_id not in self.ids():
            raise UnknownId(f"model_id {model_id} is not registered; there are {sorted(self.ids())}")
        self._resident.pop(model_id, None)
        self._evicted.pop(model_id, None)
        if path := self._files.pop(model_id, None):
            path.unlink(missing_ok=True)

    def ids(self) -> list[str]:
        return [*self._resident, *self._evicted]

    def move(self, device: torch.device) -> None:
        """Move every resident model's tensors, as for sleep and wake-up."""
        for model in self._resident.values():
            _move(model, device)
            model.bind()

    def _make_room(self) -> None:
        """Evict until one more may come. A model that cannot be set aside stays where it is."""
        while len(self._resident) >= self._max_resident:
            model_id, model = next(iter(self._resident.items()))
            if self._base.device.type == "cpu":
                self._spill(model_id, model)
            else:
                _move(model, torch.device("cpu"))
            self._evicted[model_id] = self._resident.pop(model_id)

    def _spill(self, model_id: str, model: TrainedModel) -> None:
        self._created += 1
        path = self._spill_dir / f"{self._created}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({str(i): tensor.data for i, tensor in enumerate(model.tensors())}, path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise StorageFull(f"model {model_id}, idle, cannot make room: {error}") from error
        model.unbind()
        for tensor in model.tensors():
            tensor.data = torch.empty(0)
        self._files[model_id] = path

    def _bring_back(self, model_id: str) -> None:
        self._make_room()
        model = self._evicted[model_id]
        path = self._files.get(model_id)
        if path:
            stored = load_file(path)
            for i, tensor in enumerate(model.tensors()):
                tensor.data = stored[str(i)]
            self._files.pop(model_id).unlink()
        else:
            _move(model, self._base.device)
        model.bind()
        self._resident[model_id] = self._evicted.pop(model_id)


def _move(model: TrainedModel, device: torch.device) -> None:
    model.unbind()
    for tensor in model.tensors():
        tensor.data = tensor.data.to(device)
