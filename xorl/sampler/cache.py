"""Keeps the keys and values of running rows, left-padded so that all rows end in the same column.

Y: layers; B: rows; G: key-value heads; C: columns, the first `width` in use; D: head size; T: packed tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_SPARE_COLUMNS = 64


class KvRows:
    """Keys and values of B sequences. Row b's tokens stand in columns pads[b]..width."""

    def __init__(self, store_Y2BGCD: Tensor, pads: list[int], width: int) -> None:
        self._store = store_Y2BGCD
        self.pads = pads
        self.width = width
        self._pads_B = torch.tensor(pads, device=store_Y2BGCD.device)

    def __len__(self) -> int:
        return len(self.pads)

    @property
    def positions_B(self) -> Tensor:
        """The position of each row's next token."""
        return self.width - self._pads_B

    def bias_B11C(self, dtype: torch.dtype) -> Tensor:
        """What to add to attention scores over the present columns and the next: 0, or -inf on padding."""
        columns_C = torch.arange(self.width + 1, device=self._store.device)
        bias_BC = torch.zeros(len(self), self.width + 1, dtype=dtype, device=self._store.device)
        return bias_BC.masked_fill_(columns_C < self._pads_B[:, None], float("-inf"))[:, None, None]

    def reserve(self) -> None:
        """Make room for one more column."""
        if self.width == self._store.shape[4]:
            self._store = _with_spare(self._store)

    def put(self, layer_idx: int, key_BG1D: Tensor, value_BG1D: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next column of one layer; returns that layer's keys and values up to it."""
        keys_BGCD, values_BGCD = self._store[layer_idx, 0], self._store[layer_idx, 1]
        keys_BGCD[:, :, self.width] = key_BG1D[:, :, 0]
        values_BGCD[:, :, self.width] = value_BG1D[:, :, 0]
        return keys_BGCD[:, :, : self.width + 1], values_BGCD[:, :, : self.width + 1]

    def select(self, rows: Sequence[int]) -> "KvRows":
        """Only these rows, in this order, without columns that are padding in all of them."""
        pads = [self.pads[row] for row in rows]
        cut = min(pads)
        index = torch.tensor(rows, device=self._store.device)
        store = self._store[:, :, :, :, cut : self.width].index_select(2, index)
        return KvRows(_with_spare(store), [pad - cut for pad in pads], self.width - cut)

    def join(self, other: "KvRows") -> "KvRows":
        """Rows of both, self's first."""
        width = max(self.width, other.width)
        shape = list(self._store.shape)
        shape[2], shape[4] = len(self) + len(other), width + _SPARE_COLUMNS
        store = self._store.new_empty(shape)
        pads: list[int] = []
        for part in (self, other):
            shift, rows = width - part.width, slice(len(pads), len(pads) + len(part))
            store[:, :, rows, :, :shift] = 0  # padding must be finite: its weight is 0, and 0 * NaN is NaN
            store[:, :, rows, :, shift:width] = part._store[:, :, :, :, : part.width]
            pads += [pad + shift for pad in part.pads]
        return KvRows(store, pads, width)


class RowsCache(Cache):
    """Lets a transformers model read and extend KvRows by one token."""

    def __init__(self, rows: KvRows) -> None:
        super().__init__(layers=[])
        self._rows = rows
        rows.reserve()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        return self._rows.put(layer_idx, key_states, value_states)


class PackedCache(Cache):
    """Records the keys and values of sequences packed end to end."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._keys_GTD: list[Tensor] = []
        self._values_GTD: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        self._keys_GTD.append(key_states[0])
        self._values_GTD.append(value_states[0])
        return key_states, value_states

    def unpack(self, lengths: Sequence[int], sources: Sequence[int]) -> KvRows:
        """Row b is a copy of packed sequence sources[b]."""
        stops = torch.tensor(lengths).cumsum(0)
        stop_B = stops[list(sources)]
        length_B = torch.tensor([lengths[source] for source in sources])
        width = int(length_B.max())
        pads = (width - length_B).tolist()
        index_BC = (stop_B[:, None] - width + torch.arange(width)).clamp_(min=0).to(self._keys_GTD[0].device)
        heads, _, size = self._keys_GTD[0].shape
        shape = (len(self._keys_GTD), 2, len(sources), heads, width + _SPARE_COLUMNS, size)
        store = self._keys_GTD[0].new_empty(shape)
        for layer_idx, (keys_GTD, values_GTD) in enumerate(zip(self._keys_GTD, self._values_GTD, strict=True)):
            store[layer_idx, 0, :, :, :width] = keys_GTD[:, index_BC].transpose(0, 1)
            store[layer_idx, 1, :, :, :width] = values_GTD[:, index_BC].transpose(0, 1)
        return KvRows(store, pads, width)


def _with_spare(store_Y2BGCD: Tensor) -> Tensor:
    shape = list(store_Y2BGCD.shape)
    shape[4] += _SPARE_COLUMNS
    roomy = store_Y2BGCD.new_empty(shape)
    roomy[:, :, :, :, : store_Y2BGCD.shape[4]] = store_Y2BGCD
    return roomy
