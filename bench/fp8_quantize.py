"""How near to memory's speed are weights merged, quantised and packed? `python -m bench.fp8_quantize [--device cuda]`

O, I: outputs and inputs of a weight; R: rank of an adapter; U: bytes of a bucket. The floor reads each weight once, in
bfloat16, and writes its codes once: 3 bytes an element, 4 where bfloat16 is written, at the rate of a copy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bench.harness import Options, Result, compare, copy_rate, options, report
from xorl_kernels.fp8_quantize import Form, Lora, Packer, Piece, ToBfloat16, ToFp8, dequantize, reference, scale_shape

BUCKET_ALIGNMENT = 256
LORA_SCALE = 2.0

Output = Form | Literal["bfloat16"]


class Model(NamedTuple):
    name: str
    num_layers: int
    shapes: tuple[tuple[int, int], ...]  # [O, I] of the weights of one


QWEN3_8B = Model(
    "Qwen3-8B", 36, ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(12288, 4096)] * 2, (4096, 12288))
)
QWEN3_30B_EXPERTS = Model("Qwen3-30B-A3B experts", 2, ((768, 2048), (768, 2048), (2048, 768)) * 128)
LLAMA3_70B = Model(
    "Llama-3-70B", 1, ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), *[(28672, 8192)] * 2, (8192, 28672))
)
TINY = Model("tiny", 2, ((256, 256), (128, 256), (272, 144)))
RANKS = (0, 16, 64)  # 0: without an adapter


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__ or "", arguments)
    on_cuda = chosen.device.type == "cuda"
    models = [QWEN3_8B, QWEN3_30B_EXPERTS, LLAMA3_70B] if on_cuda else [TINY]
    results = []
    for model in models:
        weights = make_weights(model, chosen.device)
        for output, rank in cases(model):
            results += measure(model, weights, output, rank, chosen)
        del weights
    report("weights merged, quantised and packed into a bucket", results, chosen)


def cases(model: Model) -> Iterator[tuple[Output, int]]:
    """What is written and with an adapter of which rank: everything once, then what differs between models."""
    forms: tuple[Form, ...] = ("block", "channel", "tensor")
    for form in forms:
        for rank in RANKS if form == "block" or model in (QWEN3_8B, TINY) else (0,):
            yield form, rank
    yield "bfloat16", 16


def make_weights(model: Model, device: torch.device) -> list[Tensor]:
    """Parts of one buffer, so that a copy has a source of as many bytes."""
    shapes = model.shapes * model.num_layers
    flat = torch.empty(sum(map(math.prod, shapes)), dtype=torch.bfloat16, device=device)
    torch.manual_seed(0)
    weights = [part.view(shape) for part, shape in zip(flat.split([*map(math.prod, shapes)]), shapes, strict=True)]
    for weight_OI in weights:
        weight_OI.normal_(std=weight_OI.shape[1] ** -0.5)
    return weights


def measure(model: Model, weights: Sequence[Tensor], output: Output, rank: int, chosen: Options) -> list[Result]:
    """Ours and its peers on all weights of a model."""
    pieces = lay_out(weights, output, rank)
    packer = Packer(pieces)
    bucket_U = torch.zeros(packer.bucket_bytes, dtype=torch.uint8, device=chosen.device)
    check(packer, bucket_U)
    one_by_one = [Packer([piece]) for piece in pieces]
    num_weights = sum(weight_OI.numel() for weight_OI in weights)
    bytes_each = 4 if output == "bfloat16" else 3
    copied_U = torch.empty(num_weights * bytes_each // 2, dtype=torch.uint8, device=chosen.device)
    source_U = _flat(weights).view(torch.uint8)[: len(copied_U)]
    competitors: dict[str, Callable[[], object]] = {
        "xorl": lambda: packer.write(bucket_U),
        "xorl, one launch a weight": lambda: [one.write(bucket_U) for one in one_by_one],
        "device copy of the same bytes": lambda: copied_U.copy_(source_U),
        "torch eager": lambda: reference.pack(pieces, bucket_U),
    }
    if not chosen.small and output != "bfloat16" and rank == 0:  # compiling takes seconds a shape
        competitors["torch.compile, not packed"] = _compiled(pieces)
    rate = copy_rate(chosen.device, 2**30 if chosen.device.type == "cuda" else 2**20 if chosen.small else 2**26)
    words = f"{model.name}, {output}" + f", rank {rank}" * (rank > 0)
    floors_s = dict.fromkeys(competitors, num_weights * bytes_each / rate)
    return compare(words, competitors, floors_s, chosen, f"{bytes_each} B a weight at {rate / 1e9:,.0f} GB/s")


def lay_out(weights: Sequence[Tensor], output: Output, rank: int) -> list[Piece]:
    """A place in a bucket for each weight, and an adapter for it if `rank` is not 0."""
    pieces: list[Piece] = []
    end = 0
    for index, weight_OI in enumerate(weights):
        lora = _lora(weight_OI, rank) if rank else None
        if output == "bfloat16":
            pieces.append(ToBfloat16(str(index), weight_OI, end, lora))
            end = _aligned(end + 2 * weight_OI.numel())
            continue
        scales_at = _aligned(end + weight_OI.numel())
        pieces.append(ToFp8(str(index), weight_OI, end, scales_at, output, lora=lora))
        rows, cols = weight_OI.shape
        end = _aligned(scales_at + 4 * math.prod(scale_shape(rows, cols, output)))
    return pieces


def _lora(weight_OI: Tensor, rank: int) -> Lora:
    num_outputs, num_inputs = weight_OI.shape
    a_RI = torch.randn(rank, num_inputs, device=weight_OI.device) / num_inputs**0.5
    return Lora(a_RI, torch.randn(num_outputs, rank, device=weight_OI.device) / num_outputs**0.5, LORA_SCALE)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT


def _flat(weights: Sequence[Tensor]) -> Tensor:
    """The buffer that they are parts of."""
    return weights[0].as_strided((sum(weight_OI.numel() for weight_OI in weights),), (1,))


def check(packer: Packer, bucket_U: Tensor) -> None:
    """A wrong answer is not worth timing: the reference's bits; after a merge, whose sums differ in order, close."""
    expected_U = torch.zeros_like(bucket_U)
    packer.write(bucket_U)
    assert not packer.nonfinite()
    reference.pack(packer.pieces, expected_U)
    if all(piece.lora is None for piece in packer.pieces):
        assert torch.equal(bucket_U, expected_U), "not the reference's bits"
        return
    for piece in packer.pieces:
        values, expected = (_values(piece, bucket) for bucket in (bucket_U, expected_U))
        off = (values - expected).norm() / expected.norm()
        assert off < 2**-7, f"{piece.name} is off by {off.item():.1e}"


def _values(piece: Piece, bucket_U: Tensor) -> Tensor:
    """What a receiver makes of a piece, [O, I] in float32."""
    shape = piece.weight_OI.shape
    if not isinstance(piece, ToFp8):
        return bucket_U[piece.offset :][: 2 * shape.numel()].view(torch.bfloat16).view(shape).float()
    codes_OI = bucket_U[piece.offset :][: shape.numel()].view(torch.float8_e4m3fn).view(shape)
    rows, cols = shape
    its_shape = scale_shape(rows, cols, piece.form)
    scales = bucket_U[piece.scale_offset :][: 4 * math.prod(its_shape)].view(torch.float32)
    return dequantize(codes_OI, scales.view(its_shape))


def _compiled(pieces: Sequence[Piece]) -> Callable[[], None]:
    """The reference's arithmetic through torch.compile, which cannot write into a bucket: it has less to do."""
    torch.compiler.reset()
    quantize = torch.compile(reference.quantize, dynamic=False)
    to_fp8 = [piece for piece in pieces if isinstance(piece, ToFp8)]

    def run() -> None:
        for piece in to_fp8:
            quantize(piece.weight_OI, piece.form)

    return run


if __name__ == "__main__":
    main()
