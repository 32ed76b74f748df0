"""Weights for inference servers: LoRA merged, quantised to FP8 and packed into a bucket, in one pass.

O, I: outputs and inputs of a weight; U: bytes of a bucket.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from xorl_kernels.dispatch import use_triton
from xorl_kernels.fp8_quantize import reference
from xorl_kernels.fp8_quantize.reference import (
    Form,
    Lora,
    Piece,
    ToBfloat16,
    ToFloat32,
    ToFp8,
    bytes_needed,
    scale_shape,
)

__all__ = [
    "Form",
    "Lora",
    "Packer",
    "Piece",
    "ToBfloat16",
    "ToFloat32",
    "ToFp8",
    "dequantize",
    "fp8_quantize",
    "scale_shape",
]


class Packer:
    """Writes the current values of weights into buckets of one layout, as often as they change.

    On CUDA one launch packs all weights of a kind (dtype, form, merged or not, aligned or not), small ones included;
    the tensors' memory is remembered, so they must be changed in place. Weights and bucket live on one device.

    Raises:
        ValueError: a piece cannot be packed; names it.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self.bucket_bytes = bytes_needed(self.pieces)
        self._flags_P: Tensor | None = None
        if use_triton(self.pieces[0].weight_OI):
            from xorl_kernels.fp8_quantize import kernel  # Triton is not installed everywhere

            launches = kernel.plan(self.pieces)
            self._pack = lambda bucket_U: kernel.pack(launches, bucket_U, len(self.pieces))
        else:
            self._pack = lambda bucket_U: reference.pack(self.pieces, bucket_U)

    def write(self, bucket_U: Tensor) -> None:
        """Fill the pieces' places in a flat uint8 tensor; what lies between them stays. Does not wait for the GPU."""
        if bucket_U.dtype != torch.uint8 or bucket_U.dim() != 1 or bucket_U.numel() < self.bucket_bytes:
            raise ValueError(f"the bucket must be at least {self.bucket_bytes} bytes, flat, got {bucket_U.shape}")
        self._flags_P = self._pack(bucket_U)

    def nonfinite(self) -> list[str]:
        """The weights that held a NaN or an infinity in the last write, after merging; waits for it.

        A bucket with any must not be sent: its codes mean nothing there.
        """
        assert self._flags_P is not None, "nothing was written"
        return [piece.name for piece, flag in zip(self.pieces, self._flags_P.tolist(), strict=True) if flag]


def fp8_quantize(weight_OI: Tensor, form: Form = "block", power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise a weight to e4m3: w ≈ codes · scales. `reference.quantize` is the definition.

    Args:
        weight_OI: bfloat16 or float32, of any strides.
        form: a scale each 128 × 128 block, each row (output channel), or one for all.
        power_of_two: round scales up to powers of two.

    Returns:
        codes [O, I] float8_e4m3fn and scales float32: [⌈O / 128⌉, ⌈I / 128⌉], [O, 1] or [1]. A scale is NaN or infinite
        where a weight of its block was.
    """
    rows, cols = weight_OI.shape
    shape = scale_shape(rows, cols, form)
    codes_bytes, scale_bytes = weight_OI.numel(), 4 * torch.Size(shape).numel()
    start = -(-codes_bytes // 16) * 16
    bucket_U = torch.empty(start + scale_bytes, dtype=torch.uint8, device=weight_OI.device)
    Packer([ToFp8("weight", weight_OI, 0, start, form, power_of_two)]).write(bucket_U)
    codes_OI = bucket_U[:codes_bytes].view(torch.float8_e4m3fn).view(weight_OI.shape)
    return codes_OI, bucket_U[start:].view(torch.float32).view(shape)


def dequantize(codes_OI: Tensor, scales: Tensor, out_OI: Tensor | None = None) -> Tensor:
    """q · s: the weight that a receiver computes with. The scales' shape says of which form they are.

    Args:
        out_OI: where to, rounded to its dtype; by default a new float32 tensor.

    Raises:
        ValueError: the scales have none of the shapes that fit.
    """
    rows, cols = codes_OI.shape
    if out_OI is None:
        out_OI = torch.empty(rows, cols, device=codes_OI.device)
    if use_triton(codes_OI) and scales.shape == scale_shape(rows, cols, "block"):
        from xorl_kernels.fp8_quantize import kernel  # Triton is not installed everywhere

        kernel.dequantize(codes_OI, scales, out_OI)
        return out_OI
    return out_OI.copy_(reference.dequantize(codes_OI, scales))
