"""Lays tensors into buckets."""

from collections.abc import Iterable
from math import inf, prod
from typing import Literal, NamedTuple, get_args

WireDtype = Literal["float32", "bfloat16", "float8_e4m3fn"]
ITEM_BYTES: dict[WireDtype, int] = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}

assert set(ITEM_BYTES) == set(get_args(WireDtype))


class TensorSpec(NamedTuple):
    """A tensor as it goes over the wire."""

    name: str
    dtype: WireDtype
    shape: tuple[int, ...]

    @property
    def num_items(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_items * ITEM_BYTES[self.dtype]


class Item(NamedTuple):
    """What is sent for one weight; codes and their scales are made together, so they are not parted."""

    values: TensorSpec
    scales: TensorSpec | None = None

    @property
    def tensors(self) -> list[TensorSpec]:
        return [self.values] if self.scales is None else [self.values, self.scales]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


class Bucket(NamedTuple):
    """Items that travel in one broadcast, tensors back to back.

    The receivers' format has no padding and yet wants each tensor at a multiple of its item size; the kernel that packs
    wants codes at multiples of 16. Ordered by the largest power of two in its size, each lies at a multiple of that.
    """

    items: tuple[Item, ...]

    @property
    def tensors(self) -> list[TensorSpec]:
        tensors = [tensor for item in self.items for tensor in item.tensors]
        return sorted(tensors, key=_power_of_two_in, reverse=True)

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)

    @property
    def offsets(self) -> dict[str, int]:
        """Where each tensor begins, by name, in the order of the bytes."""
        offsets, end = {}, 0
        for tensor in self.tensors:
            offsets[tensor.name] = end
            end += tensor.num_bytes
        return offsets


def _power_of_two_in(tensor: TensorSpec) -> float:
    """The largest in its size; an empty tensor's place must be one for any."""
    return tensor.num_bytes & -tensor.num_bytes or inf


def lay_out(items: Iterable[Item], bucket_bytes: int) -> list[Bucket]:
    """Cut the list into buckets of at most `bucket_bytes`; a larger item has a bucket of its own.

    Items keep their order, and empty ones are left out. The last bucket is filled first, so that the first one has what
    is left over: while it is produced nothing is on the wire.
    """
    buckets: list[list[Item]] = []
    room = 0
    for item in reversed([item for item in items if item.num_bytes]):
        if not buckets or item.num_bytes > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(item)
        room -= item.num_bytes
    return [Bucket(tuple(reversed(bucket))) for bucket in reversed(buckets)]
