"""The plain PyTorch twin of quantise and pack; also the CPU path.

O, I: outputs and inputs of a weight; R: rank of an adapter; U: bytes of a bucket; P: pieces in it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-10
BLOCK = 128
Form = Literal["block", "channel", "tensor"]


class Lora(NamedTuple):
    """An adapter to add to a weight: scale · B A."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


class ToBfloat16(NamedTuple):
    """A weight that goes into the bucket as bfloat16, from byte `offset` on, an even number."""

    name: str
    weight_OI: Tensor
    offset: int
    lora: Lora | None = None


class ToFloat32(NamedTuple):
    """A weight that goes into the bucket as float32, from byte `offset` on, a multiple of 4."""

    name: str
    weight_OI: Tensor
    offset: int
    lora: Lora | None = None


class ToFp8(NamedTuple):
    """A weight that goes into the bucket as e4m3 codes; its float32 scales begin at `scale_offset`, a multiple of 4."""

    name: str
    weight_OI: Tensor
    offset: int
    scale_offset: int
    form: Form = "block"
    power_of_two: bool = False
    lora: Lora | None = None


Piece = ToBfloat16 | ToFloat32 | ToFp8

ITEM_BYTES = {ToBfloat16: 2, ToFloat32: 4, ToFp8: 1}


@torch.no_grad()
def pack(pieces: Sequence[Piece], bucket_U: Tensor) -> Tensor:
    """Write every piece to its place; [P] says which held a NaN or an infinity."""
    return torch.stack([_pack_one(piece, bucket_U) for piece in pieces])


def _pack_one(piece: Piece, bucket_U: Tensor) -> Tensor:
    values_OI = merge(piece.weight_OI, piece.lora)
    match piece:
        case ToBfloat16():
            values_OI = values_OI.to(torch.bfloat16)
            _put(values_OI, bucket_U, piece.offset)
        case ToFloat32():
            _put(values_OI.float(), bucket_U, piece.offset)
        case ToFp8():
            codes_OI, scales = quantize(values_OI, piece.form, piece.power_of_two)
            _put(codes_OI, bucket_U, piece.offset)
            _put(scales, bucket_U, piece.scale_offset)
    return ~values_OI.isfinite().all()


def _put(x: Tensor, bucket_U: Tensor, offset: int) -> None:
    bytes_U = x.contiguous().view(-1).view(torch.uint8)
    bucket_U[offset : offset + len(bytes_U)] = bytes_U


def merge(weight_OI: Tensor, lora: Lora | None) -> Tensor:
    """W + s · B A in W's dtype, as a merged checkpoint holds it; W itself without an adapter.

    The factors are rounded to W's dtype first, since that is what the training forward multiplies with; the products
    are summed in float32. So a bfloat16 model has bfloat16 products, and a float32 model is merged without rounding.
    """
    if lora is None:
        return weight_OI
    a_RI, b_OR = (factor.to(weight_OI.dtype).float() for factor in (lora.a_RI, lora.b_OR))
    return (weight_OI.float() + lora.scale * (b_OR @ a_RI)).to(weight_OI.dtype)


def quantize(weight_OI: Tensor, form: Form = "block", power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """q = e4m3(clamp(w · (1 / s), ±448)) and s = max(amax, 1e-10) · (1 / 448), so that w ≈ q · s.

    A product with the reciprocal, in float32, and not a division of each weight: this is the format, and the two differ
    in the last code for some weights. A block of zeros has a tiny scale and codes 0; one with a NaN or an infinity has
    that as its scale, and its codes mean nothing.

    Source: DeepGEMM's per_block_cast_to_fp8, also in SGLang: x · (1 / s); older versions, 448 / amax.
    Its least amax of 1e-4 would cost small blocks their accuracy; 1e-10 is that of SGLang's activation quantiser.
    """
    w_OI = weight_OI.float()
    scales = scale_of(_amax(w_OI, form), power_of_two)
    inverse_OI = 1.0 / scales
    if form == "block":
        rows, cols = w_OI.shape
        inverse_OI = inverse_OI.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :cols]
    return (w_OI * inverse_OI).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize(codes_OI: Tensor, scales: Tensor) -> Tensor:
    """q · s in float32, of every form."""
    rows, cols = codes_OI.shape
    if scales.shape == scale_shape(rows, cols, "block"):
        scales = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :cols]
    elif scales.shape not in (scale_shape(rows, cols, "channel"), scale_shape(rows, cols, "tensor")):
        raise ValueError(f"scales of shape {list(scales.shape)} do not fit codes of {rows} by {cols}")
    return codes_OI.float() * scales


def scale_of(amax: Tensor, power_of_two: bool) -> Tensor:
    """s = max(amax, 1e-10) / 448, rounded up to a power of two on request.

    The division is a product with 1 / 448, since PyTorch makes it one on CUDA and not on the CPU.
    """
    scales = amax.clamp(min=SMALLEST_AMAX) * (1 / E4M3_MAX)
    if not power_of_two:
        return scales
    rounded = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(scales.isfinite(), rounded, scales)


def scale_shape(rows: int, cols: int, form: Form) -> tuple[int, ...]:
    """Of the scales that receivers expect: a cut last block is just a smaller block."""
    shapes: dict[Form, tuple[int, ...]] = {
        "block": (-(-rows // BLOCK), -(-cols // BLOCK)),
        "channel": (rows, 1),
        "tensor": (1,),
    }
    return shapes[form]


def _amax(w_OI: Tensor, form: Form) -> Tensor:
    rows, cols = w_OI.shape
    match form:
        case "block":
            padded_OI = F.pad(w_OI.abs(), (0, -cols % BLOCK, 0, -rows % BLOCK))
            num_rows, num_cols = scale_shape(rows, cols, form)
            return padded_OI.view(num_rows, BLOCK, num_cols, BLOCK).amax(dim=(1, 3))
        case "channel":
            return w_OI.abs().amax(dim=1, keepdim=True)
        case "tensor":
            return w_OI.abs().amax().view(1)


def bytes_needed(pieces: Sequence[Piece]) -> int:
    """The least size of a bucket that holds the pieces.

    Raises:
        ValueError: a piece cannot be packed; names it.
    """
    return max(_end(piece) for piece in pieces)


def _end(piece: Piece) -> int:
    weight_OI = piece.weight_OI
    _require(piece, weight_OI.dim() == 2 and weight_OI.numel() > 0, f"a full matrix, got {tuple(weight_OI.shape)}")
    _require(piece, weight_OI.dtype in (torch.bfloat16, torch.float32), f"bfloat16 or float32, got {weight_OI.dtype}")
    if piece.lora is not None:
        a_RI, b_OR, _ = piece.lora
        _require(piece, a_RI.dtype == b_OR.dtype in (torch.bfloat16, torch.float32), "factors of one dtype")
        _require(piece, a_RI.stride(1) == 1 == b_OR.stride(1), "factors with rows in one piece")
        fits = b_OR.shape[1] == a_RI.shape[0] > 0 and (b_OR.shape[0], a_RI.shape[1]) == weight_OI.shape
        _require(piece, fits, f"factors that fit, got {tuple(b_OR.shape)} and {tuple(a_RI.shape)}")
    item_bytes = ITEM_BYTES[type(piece)]
    whole = piece.offset >= 0 and piece.offset % item_bytes == 0
    _require(piece, whole, f"an offset that is a multiple of {item_bytes}, got {piece.offset}")
    end = piece.offset + item_bytes * weight_OI.numel()
    if not isinstance(piece, ToFp8):
        return end
    whole = piece.scale_offset >= 0 and piece.scale_offset % 4 == 0
    _require(piece, whole, f"scales at a multiple of 4, got {piece.scale_offset}")
    rows, cols = weight_OI.shape
    num_scales = torch.Size(scale_shape(rows, cols, piece.form)).numel()
    return max(end, piece.scale_offset + 4 * num_scales)


def _require(piece: Piece, condition: bool, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{piece.name}: packing wants {wanted}")
