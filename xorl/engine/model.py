"""Builds the base model and runs packed sequences through it.

T: tokens of one packed batch; H: hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from xorl.config import ModelConfig
from xorl.engine import attention, parallel
from xorl.engine.commands import ModelInfo
from xorl.engine.lora import LoraLinear, Router, attach
from xorl.engine.ranks import ONE_RANK, Ranks
from xorl.errors import InvalidRequest


class BaseModel:
    """A causal language model of Hugging Face's, its layers ready for adapters unless full weights are trained.

    Full weights are float32 masters, computed with in `dtype`; a frozen base is held in `dtype`, or its linear layers
    in FP8.
    """

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks = ONE_RANK,
        *,
        shard: Literal["auto", "always", "never"] = "never",
        activation_checkpointing: bool = False,
        offload_activations: bool = False,
    ) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.full = config.full
        self.path = config.model
        self.ranks = ranks
        dtype = torch.float32 if config.full else self.dtype
        self.network = load_network(config.model, dtype, torch.device("cpu")).requires_grad_(config.full)
        self.network.set_attn_implementation(attention.NAME)
        self.sharded = parallel.is_to_be_sharded(shard, self.network, ranks, self.device)
        if self.sharded and (offload_activations or config.fp8):
            name = "offload_activations" if offload_activations else "fp8"
            raise InvalidRequest(f"{name}: not with layers that are split over the ranks; set shard to never")
        if not self.sharded:
            nn.Module.to(self.network, self.device)
        self.router = Router() if config.full else attach(self.network, fp8=config.fp8, together=not self.sharded)
        if self.sharded:
            parallel.shard(self.network, self.dtype, ranks, self.device)
        self._offload_activations = offload_activations
        self._sequences = attention.sequences_for(self.device, self.dtype)
        if activation_checkpointing:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
            self.network.train()  # transformers recomputes in train mode only; dropout is 0 in the models served

    @property
    def head_VH(self) -> Tensor:
        head = self.network.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight.to(self.dtype)

    @property
    def tied(self) -> bool:
        return self.network.get_output_embeddings().weight is self.network.get_input_embeddings().weight  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]

    def scales(self, name: str) -> Tensor | None:
        """Of the 128 × 128 blocks of a parameter that is e4m3 codes."""
        path, _, kind = name.rpartition(".")
        layer = self.network.get_submodule(path)
        return layer.scales if isinstance(layer, LoraLinear) and kind == "weight" else None

    def sequences(self, lengths: Sequence[int]) -> attention.Sequences:
        """Of a batch, for `hidden_states`."""
        return self._sequences(lengths, self.device)

    def hidden_states(self, tokens_T: Tensor, places_T: Tensor, sequences: attention.Sequences) -> Tensor:
        """Final hidden states [T, H], in `dtype`, of sequences laid end to end; none sees its neighbours.

        Args:
            places_T: where each token stands in its sequence.
        """
        with self._autocast(), self._saving():
            output = self.network.base_model(
                input_ids=tokens_T[None], position_ids=places_T[None], use_cache=False, sequences=sequences
            )
        return output.last_hidden_state[0].to(self.dtype)

    def move(self, device: torch.device) -> None:
        """Put the weights elsewhere, as for sleep; `device` stays where the model computes."""
        nn.Module.to(self.network, device)
        self.router.restack()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.full and self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        return nullcontext()

    def _saving(self) -> AbstractContextManager[object]:
        """Where the forward keeps what the backward needs."""
        if not self._offload_activations:
            return nullcontext()
        return offloading({parameter.untyped_storage().data_ptr() for parameter in self.network.parameters()})

    def info(self) -> ModelInfo:
        config = self.network.config
        return ModelInfo(
            names=list(dict.fromkeys([self.path, Path(self.path).name])),
            path=self.path,
            arch=config.model_type,
            vocab_size=self.head_VH.shape[0],
            max_context_length=config.max_position_embeddings,
            full_weights=self.full,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            tied_embeddings=self.tied,
        )


@contextmanager
def offloading(weights: set[int]) -> Iterator[None]:
    """Keep what the backward needs in CPU memory, except for the weights, given by the address of their storage."""

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, kept.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, kept = packed
        return kept.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def load_network(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a causal language model, in eval mode.

    Raises:
        InvalidRequest: naming the model, if it is not there or computes something that we do not.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        _refuse_unknown_parts(path, config)
        network = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"model {path}: {error}") from error
    head = network.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InvalidRequest(f"model {path}: {config.model_type} has no plain linear LM head")
    nn.Module.to(network, device)
    return network.eval()


def _refuse_unknown_parts(path: str, config: PretrainedConfig) -> None:
    """Our attention and log-probabilities stand in for the model's own, so what they lack would be silently wrong."""
    settings = config.to_dict()
    if set(settings.get("layer_types") or ()) - {"full_attention"} or settings.get("sliding_window"):
        raise InvalidRequest(
            f"model {path}: only full causal attention is supported, {config.model_type} has other layers"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale"):
        if settings.get(name):
            raise InvalidRequest(f"model {path}: {name} of {config.model_type} is not supported")


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
