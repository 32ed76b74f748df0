"""Runs the model: packed prefill, one-token decode, logits.

T: packed tokens; B: rows; H: hidden size; V: vocabulary; C: columns of the cache; D: head size; G: key-value heads.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from xorl.engine.attention import ByLength
from xorl.engine.lora import Span, attach
from xorl.sampler.adapters import LoadedAdapter
from xorl.sampler.cache import KvRows, PackedCache, RowsCache
from xorl.types import UNEMBEDDING

_ATTENTION = "xorl_sampler"


class Network:
    """A causal language model of Hugging Face's, with LoRA layers and a cache that this package owns."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation(_ATTENTION)
        model.requires_grad_(False)
        self.model = model
        self._router = attach(model)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, nn.Linear)
        self._head = head
        self.tied = head.weight is embedding.weight
        self.vocab_size = head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self._head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._head.weight.dtype

    def prefill(
        self, sequences: Sequence[Sequence[int]], adapters: Sequence[LoadedAdapter | None]
    ) -> tuple[Tensor, PackedCache]:
        """Final hidden states [T, H] of sequences laid end to end, and their keys and values."""
        lengths = tuple(len(sequence) for sequence in sequences)
        tokens_T = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        cache = PackedCache()
        with self._router.routing(spans(adapters, lengths)):
            output = self.model.base_model(
                input_ids=tokens_T[None],
                position_ids=positions_T[None],
                past_key_values=cache,
                use_cache=True,
                packed_lengths=lengths,
            )
        return output.last_hidden_state[0], cache

    def decode(self, tokens: Sequence[int], rows: KvRows, adapters: Sequence[LoadedAdapter | None]) -> Tensor:
        """Extend every row by its token; returns the final hidden states [B, H]."""
        with self._router.routing(spans(adapters, [1] * len(rows))):
            output = self.model.base_model(
                input_ids=torch.tensor(tokens, device=self.device)[:, None],
                position_ids=rows.positions_B[:, None],
                past_key_values=RowsCache(rows),
                use_cache=True,
                rows_bias=rows.bias_B11C(self.dtype),
            )
        rows.width += 1
        return output.last_hidden_state[:, 0]

    def logits(self, hidden_TH: Tensor, adapters: Sequence[LoadedAdapter | None], lengths: Sequence[int]) -> Tensor:
        """[T, V] float32; lengths[i] consecutive rows of `hidden_TH` belong to adapters[i]."""
        logits_TV = F.linear(hidden_TH, self._head.weight).float()
        for span in spans(adapters, lengths):
            if UNEMBEDDING in span.adapter:
                a_RH, b_VR = span.adapter[UNEMBEDDING]
                xa_SR = F.linear(hidden_TH[span.start : span.stop], a_RH.to(hidden_TH.dtype)) * span.scale
                logits_TV[span.start : span.stop].addmm_(xa_SR.float(), b_VR.float().T)
        return logits_TV


def spans(adapters: Sequence[LoadedAdapter | None], lengths: Sequence[int]) -> list[Span]:
    """The runs of tokens that one adapter acts on, when adapters[i] acts on the next lengths[i] tokens."""
    found, start = [], 0
    for _, run in groupby(zip(adapters, lengths, strict=True), key=lambda pair: id(pair[0])):
        pairs = list(run)
        stop, adapter = start + sum(length for _, length in pairs), pairs[0][0]
        if adapter is not None:
            found.append(Span(start, stop, adapter.pairs, adapter.scale))
        start = stop
    return found


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: tuple[int, ...] | None = None,
    rows_bias: Tensor | None = None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of packed prompts, or of one new token a row over the cache."""
    if packed_lengths is not None:
        return ByLength(packed_lengths, query.device).attend(query, key, value, scaling), None
    # Query heads that share a key-value head stand as that head's queries, so keys need no repeating.
    num_rows, num_heads, _one, size = query.shape
    query_BGQD = query.reshape(num_rows, key.shape[1], -1, size)
    out_BGQD = F.scaled_dot_product_attention(query_BGQD, key, value, attn_mask=rows_bias, scale=scaling)
    return out_BGQD.reshape(num_rows, 1, num_heads, -1), None


AttentionInterface.register(_ATTENTION, cached_attention)
