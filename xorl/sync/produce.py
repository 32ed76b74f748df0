"""Makes the bytes of buckets: merged, quantised and packed weights."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from xorl.errors import NonFinite
from xorl.quantization import Fp8
from xorl.sync.formats import Weight, one_by_one, pieces, wire_items
from xorl.sync.plan import Bucket, lay_out
from xorl_kernels.fp8_quantize import Packer


class Plan(NamedTuple):
    """What is sent, and from what it is made."""

    buckets: list[Bucket]
    weights: Mapping[str, Weight]
    fp8: Fp8 | None
    bucket_bytes: int

    @classmethod
    def of(cls, weights: Sequence[Weight], fp8: Fp8 | None, bucket_bytes: int) -> Self:
        """
        Args:
            weights: as transformers names them.

        Raises:
            InvalidRequest: naming a weight that no receiver would take.
        """
        weights = one_by_one(weights)
        buckets = lay_out(wire_items(weights, fp8), bucket_bytes)
        return cls(buckets, {weight.name: weight for weight in weights}, fp8, bucket_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(bucket.num_bytes for bucket in self.buckets)

    def packer(self, bucket: Bucket) -> Packer:
        return Packer(pieces(bucket, self.weights, self.fp8))

    def is_oversized(self, bucket: Bucket) -> bool:
        """Whether it holds one weight that is larger than a bucket."""
        return bucket.num_bytes > self.bucket_bytes


def write(packer: Packer, data: Tensor) -> None:
    """Fill a bucket.

    Raises:
        NonFinite: a weight is, so the bucket must not be sent.
    """
    packer.write(data)
    _refuse(packer.nonfinite())


def in_new_memory(packer: Packer) -> Tensor:
    """Fill a bucket in memory that goes with it."""
    device = packer.pieces[0].weight_OI.device
    data = torch.empty(packer.bucket_bytes, dtype=torch.uint8, device=device)
    write(packer, data)
    return data


def tensors_in(bucket: Bucket, data: Tensor) -> dict[str, Tensor]:
    """The tensors of a bucket by name, as views of its bytes."""
    offsets = bucket.offsets
    return {
        spec.name: data[offsets[spec.name] : offsets[spec.name] + spec.num_bytes]
        .view(getattr(torch, spec.dtype))
        .view(spec.shape)
        for spec in bucket.tensors
    }


def refuse_nonfinite(weights: Sequence[Weight]) -> None:
    """Look at what training changes, before anything is sent.

    A base weight with a NaN, or a merge that overflows, is found when its bucket is made.

    Raises:
        NonFinite: naming the weights.
    """
    trained = [
        (weight.name, tensor)
        for weight in weights
        for tensor in (weight.tensor, *(weight.lora[:2] if weight.lora else ()))
        if tensor.requires_grad
    ]
    if trained:
        finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in trained]).tolist()
        _refuse([name for (name, _), is_finite in zip(trained, finite, strict=True) if not is_finite])


def _refuse(nonfinite: Sequence[str]) -> None:
    if nonfinite:
        raise NonFinite(f"{', '.join(nonfinite)}: NaN or infinite, so nothing of it is sent")
