"""Builds the base model and runs packed sequences through it.

T: tokens of one packed batch; H: hidden size; N: sequences.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from xorl.config import ModelConfig
from xorl.engine.commands import ModelInfo
from xorl.engine.lora import LoraLinear, Router, attach
from xorl.errors import InvalidRequest


class BaseModel:
    """A causal language model of Hugging Face's, its layers ready for adapters unless full weights are trained.

    Full weights are float32 masters, computed with in `dtype`; a frozen base is held in `dtype`, or its linear layers
    in FP8.
    """

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.full = config.full
        self.path = config.model
        self.network = load_network(config.model, torch.float32 if config.full else self.dtype, self.device)
        self.network.set_attn_implementation("xorl_packed")
        self.network.requires_grad_(config.full)
        self.router = Router() if config.full else attach(self.network, fp8=config.fp8)
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

    def hidden_states(self, tokens_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Final hidden states [T, H], in `dtype`, of sequences laid end to end; none sees its neighbours."""
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        with self._autocast():
            output = self.network.base_model(
                input_ids=tokens_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                sequence_lengths=tuple(lengths),
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


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...],
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each of the sequences packed along the token axis of [1, heads, T, head_dim].

    Consecutive sequences of one length run as one batch, so that nothing is padded and nothing quadratic is wasted.
    """
    outputs, start = [], 0
    for length, count in _runs(sequence_lengths):
        stop = start + length * count
        q, k, v = (_as_batch(x[0, :, start:stop], count) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)[None], None


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(length, how many in a row), in order."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def _as_batch(x: Tensor, count: int) -> Tensor:
    """[heads, count * L, head_dim] -> [count, heads, L, head_dim]"""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


AttentionInterface.register("xorl_packed", packed_attention)
