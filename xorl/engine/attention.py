"""Runs causal attention over sequences packed end to end, in which none sees its neighbours.

T: tokens of one packed batch; N: its sequences; L: tokens of one of them; D: size of a head.
Queries have [1, heads, T, D]; keys and values too, but they may have fewer heads, each for a group of the queries'.
"""

import inspect
import itertools
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

NAME = "xorl_packed"
"""What transformers knows `packed_attention` under."""


class Sequences(Protocol):
    """The sequences of one batch, in the form that one way of computing wants them."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None: ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[1, T, heads, D]"""
        ...


def sequences_for(device: torch.device, dtype: torch.dtype) -> type[Sequences]:
    """The best way of this machine: flash-attn's or torch's own kernel for packed sequences, which know half precision
    alone; FlexAttention where there is neither; on the CPU, one call for each run of equal lengths."""
    if device.type != "cuda":
        return ByLength
    if dtype not in (torch.bfloat16, torch.float16):
        return Flex
    if find_spec("flash_attn") is not None:
        return FlashAttention
    return TorchVarlen if _torch_varlen_takes_groups() else Flex


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequences: Sequences,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """As transformers calls it."""
    return sequences.attend(query, key, value, scaling), None


class ByLength:
    """Consecutive sequences of one length run as one batch: nothing is padded, nothing quadratic is wasted."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        outputs, start, grouped = [], 0, query.shape[1] != key.shape[1]
        for length, count in self._runs:
            stop = start + length * count
            q, k, v = (_as_batch(x[0, :, start:stop], count) for x in (query, key, value))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
            start = stop
        return torch.cat(outputs)[None]


def _as_batch(x: Tensor, count: int) -> Tensor:
    """[heads, count * L, D] -> [count, heads, L, D]"""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


class _Ends:
    """Where sequences end, as kernels for packed sequences take it: [0, L0, L0 + L1, ..., T], int32."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        self._ends = ends.pin_memory().to(device, non_blocking=True)
        self._longest = max(lengths)


class FlashAttention(_Ends):
    """https://github.com/Dao-AILab/flash-attention"""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends, longest = self._ends, self._longest
        return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True)[None]


class TorchVarlen(_Ends):
    """torch.nn.attention.varlen, since torch 2.10."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        ends, longest, grouped = self._ends, self._longest, query.shape[1] != key.shape[1]
        attended = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped
        )
        assert isinstance(attended, Tensor)  # without return_aux
        return attended[None]


@cache
def _torch_varlen_takes_groups() -> bool:
    """Its first versions lack enable_gqa."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class Flex:
    """FlexAttention with a mask in blocks, made once a batch and used by every layer; takes any dtype.

    Making it takes T² bytes for a moment.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._mask = block_mask(lengths, device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        attended = _compiled_flex_attention()(query, key, value, block_mask=self._mask, scale=scale, enable_gqa=grouped)
        return attended.transpose(1, 2)


def block_mask(lengths: Sequence[int], device: torch.device) -> BlockMask:
    """A token sees the tokens up to itself of its own sequence."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sequence_T = numbers.to(device, non_blocking=True)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (sequence_T[query] == sequence_T[key])

    return create_block_mask(sees, None, None, len(numbers), len(numbers), device=str(device))


@cache
def _compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, packed_attention)
