"""Lays tensors into buckets."""

from collections.abc import Iterable
from math import prod
from typing import Literal, NamedTuple, get_args

WireDtype = Literal["float32", "bfloat16"]
ITEM_BYTES: dict[WireDtype, int] = {"float32": 4, "bfloat16": 2}

assert set(ITEM_BYTES) == set(get_args(WireDtype))


class TensorSpec(NamedTuple):
    """A tensor as it goes over the wire."""

    name: str
    dtype: WireDtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Bucket(NamedTuple):
    """Tensors that travel in one broadcast, back to back.

    The receivers' format has no padding and yet wants each tensor at a multiple of its item size, so the widest dtypes
    come first.
    """

    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def offsets(self) -> list[int]:
        offsets, end = [], 0
        for tensor in self.tensors:
            offsets.append(end)
            end += tensor.num_bytes
        return offsets


def lay_out(specs: Iterable[TensorSpec], bucket_bytes: int) -> list[Bucket]:
    """Cut the list into buckets of at most `bucket_bytes`; a larger tensor has a bucket of its own.

    Tensors keep their order from bucket to bucket; inside one, those of a dtype do. Empty tensors are left out.
    """
    buckets: list[Bucket] = []
    run: list[TensorSpec] = []
    run_bytes = 0
    for spec in specs:
        if not spec.num_bytes:
            continue
        if run and run_bytes + spec.num_bytes > bucket_bytes:
            buckets.append(_bucket(run))
            run, run_bytes = [], 0
        run.append(spec)
        run_bytes += spec.num_bytes
    return [*buckets, _bucket(run)] if run else buckets


def _bucket(run: list[TensorSpec]) -> Bucket:
    return Bucket(tuple(sorted(run, key=lambda spec: -ITEM_BYTES[spec.dtype])))
