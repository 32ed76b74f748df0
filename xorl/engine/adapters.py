"""Keeps what is trained for each model_id: parameters, optimizer and accumulated gradient.

A model that is not resident has its tensors in CPU memory (CUDA) or in a file (CPU).
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from xorl.engine.lora import Pair, Span, init_pairs, layer_shapes
from xorl.engine.model import BaseModel
from xorl.errors import InvalidRequest, NonFinite, StorageFull, UnknownId
from xorl.types import AdamParams, LoraSpec

SIDES = ("lora_A", "lora_B")
"""What PEFT calls the two halves of a pair."""


class TrainedModel:
    """What one model_id trains: an adapter, or with `spec` None the network's own weights; float32 masters."""

    def __init__(self, spec: LoraSpec | None, parameters: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.parameters = dict(parameters)
        self.num_steps = 0
        self.num_mean_tokens = 0  # valid tokens of the accumulated gradient that asks for a token mean
        self.new_optimizer()

    @classmethod
    def adapter(cls, spec: LoraSpec, base: BaseModel) -> "TrainedModel":
        pairs = init_pairs(layer_shapes(base.network, spec.target_modules), spec, base.device)
        parameters: dict[str, Tensor] = {}
        for layer, pair in pairs.items():
            parameters |= {f"{layer}.{side}": tensor for side, tensor in zip(SIDES, pair, strict=True)}
        return cls(spec, parameters)

    @classmethod
    def full(cls, base: BaseModel) -> "TrainedModel":
        return cls(None, dict(base.network.named_parameters()))

    def span(self, num_tokens: int) -> Span:
        assert self.spec is not None
        layers = {name.rpartition(".")[0] for name in self.parameters}
        return Span(0, num_tokens, {layer: self.pair(layer) for layer in layers}, self.spec.scale)

    def pair(self, layer: str) -> Pair:
        return Pair(*(self.parameters[f"{layer}.{side}"] for side in SIDES))

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Add the gradients of what runs inside to the accumulated ones; if it fails, leave those as they were."""
        before = {name: parameter.grad for name, parameter in self.parameters.items()}
        self.drop_gradients()
        if self.spec is not None:
            self._new_gradients()
        try:
            yield
        except BaseException:
            for name, parameter in self.parameters.items():
                parameter.grad = before[name]
            raise
        for name, parameter in self.parameters.items():
            earlier = before[name]
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad.add_(earlier)

    def _new_gradients(self) -> None:
        """Zeros for the kernels to add to: parts of one tensor, since a launch for each would take its time."""
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        parts = torch.zeros(sum(sizes), device=next(iter(self.parameters.values())).device).split(sizes)
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def optim_step(self, adam: AdamParams) -> float:
        """One AdamW step on the accumulated gradient, which it uses up; without one, nothing moves.

        Returns:
            The gradient's L2 norm before clipping.

        Raises:
            NonFinite: the gradient is NaN or infinite; it is dropped and the weights stay.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            return 0.0
        if self.num_mean_tokens:
            torch._foreach_div_(gradients, float(self.num_mean_tokens))
        norm = get_total_norm(gradients)
        grad_norm = norm.item()
        try:
            if not torch.isfinite(norm):
                raise NonFinite(f"the gradient's norm is {grad_norm}; the accumulated gradient was dropped")
            if adam.grad_clip_norm > 0:
                clip_grads_with_norm_(self.parameters.values(), adam.grad_clip_norm, norm)
            for group in self.optimizer.param_groups:
                group.update(
                    lr=adam.learning_rate,
                    betas=(adam.beta1, adam.beta2),
                    eps=adam.eps,
                    weight_decay=adam.weight_decay,
                )
            self.optimizer.step()
            self.num_steps += 1
        finally:
            self.drop_gradients()
            self.num_mean_tokens = 0
        return grad_norm

    def new_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters.values(), foreach=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments by parameter name, made with zeros where no step was taken yet."""
        state = {}
        for name, parameter in self.parameters.items():
            moments = self._moments(parameter)
            state |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        return state

    def _moments(self, parameter: Tensor) -> dict[str, Any]:
        moments = self.optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros(())
            moments["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            moments["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        return moments

    def tensors(self) -> dict[str, Tensor]:
        """Everything that takes memory, by a name of its own; assigning to `.data` moves it."""
        held: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            held[f"parameter.{name}"] = parameter
            if parameter.grad is not None:
                held[f"grad.{name}"] = parameter.grad
            for key, value in self.optimizer.state[parameter].items() if parameter in self.optimizer.state else ():
                if value.dim():  # AdamW's step count is a scalar that stays on the CPU
                    held[f"{key}.{name}"] = value
        return held


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
            model = TrainedModel.full(self._base) if spec is None else TrainedModel.adapter(spec, self._base)
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
            for tensor in model.tensors().values():
                tensor.data = tensor.data.to(device)

    def _make_room(self) -> None:
        """Evict until one more may come. A model that cannot be set aside stays where it is."""
        while len(self._resident) >= self._max_resident:
            model_id, model = next(iter(self._resident.items()))
            if self._base.device.type == "cpu":
                self._spill(model_id, model)
            else:
                for tensor in model.tensors().values():
                    tensor.data = tensor.data.to("cpu")
            self._evicted[model_id] = self._resident.pop(model_id)

    def _spill(self, model_id: str, model: TrainedModel) -> None:
        self._created += 1
        path = self._spill_dir / f"{self._created}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.data for name, tensor in model.tensors().items()}, path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise StorageFull(f"model {model_id}, idle, cannot make room: {error}") from error
        for tensor in model.tensors().values():
            tensor.data = torch.empty(0)
        self._files[model_id] = path

    def _bring_back(self, model_id: str) -> None:
        self._make_room()
        model = self._evicted[model_id]
        path = self._files.get(model_id)
        stored = load_file(path) if path else {name: tensor.data for name, tensor in model.tensors().items()}
        for name, tensor in model.tensors().items():
            tensor.data = stored[name].to(self._base.device)
        if path:
            self._files.pop(model_id).unlink()
        self._resident[model_id] = self._evicted.pop(model_id)
