"""Quantises, merges and packs the weights of a whole bucket, in one launch for weights of a kind.

O, I: outputs and inputs of a weight; U: bytes of a bucket; P: pieces in it; G: programs of a launch;
N: the numbers that a kernel is told of a piece.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, assert_never

import torch
import triton
import triton.language as tl
from torch import Tensor

from xorl_kernels.fp8_quantize.reference import (
    BLOCK,
    E4M3_MAX,
    ITEM_BYTES,
    SMALLEST_AMAX,
    Form,
    Lora,
    Piece,
    ToBfloat16,
    ToFloat32,
    ToFp8,
)

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Kind(NamedTuple):
    """What weights have in common that one launch packs."""

    kernel: Form | Literal["bfloat16", "float32"]
    dtype: torch.dtype
    lora_dtype: torch.dtype | None
    aligned: bool  # all loads and stores in 16-byte pieces
    power_of_two: bool


class Launch(NamedTuple):
    kind: Kind
    lora_rank: int  # the largest, padded for tensor cores; 0 without an adapter
    piece_of_program_G: Tensor
    table_PN: Tensor
    num_maxima: int  # scales whose amax is found first: one a tensor or a row
    pieces: tuple[Piece, ...]  # keeps alive what the table points to


def plan(pieces: Sequence[Piece]) -> list[Launch]:
    """The launches that pack these pieces, their tables on the weights' device. Pointers are read here, once."""
    kinds: defaultdict[Kind, list[tuple[int, Piece]]] = defaultdict(list)
    for index, piece in enumerate(pieces):
        kinds[_kind(piece)].append((index, piece))
    return [_launch(kind, members) for kind, members in kinds.items()]


def pack(launches: Sequence[Launch], bucket_U: Tensor, num_pieces: int) -> Tensor:
    """Write every piece to its place; [P] int32 on the device is not 0 where one held a NaN or an infinity."""
    if bucket_U.data_ptr() % 16:
        raise ValueError("a bucket starts at a multiple of 16 bytes")
    flags_P = torch.zeros(num_pieces, dtype=torch.int32, device=bucket_U.device)
    codes_U = bucket_U.view(torch.float8_e4m3fn)
    float32_U = bucket_U[: bucket_U.numel() // 4 * 4].view(torch.float32)
    bfloat16_U = bucket_U[: bucket_U.numel() // 2 * 2].view(torch.bfloat16)
    for launch in launches:
        arguments = constants(launch.kind, launch.lora_rank) | dict(
            codes_ptr=codes_U,
            scales_ptr=float32_U,
            out_ptr=float32_U if launch.kind.kernel == "float32" else bfloat16_U,
            flags_ptr=flags_P,
            amax_ptr=torch.zeros(launch.num_maxima, dtype=torch.int32, device=bucket_U.device),
            piece_of_program_ptr=launch.piece_of_program_G,
            table_ptr=launch.table_PN,
        )
        for function in functions(launch.kind):
            wanted = {name: arguments[name] for name in function.arg_names}
            function[(len(launch.piece_of_program_G),)](**wanted, **compile_options(launch.kind))
    return flags_P


def dequantize(codes_OI: Tensor, scales: Tensor, out_OI: Tensor) -> None:
    """q · s of the block form, rounded to the dtype of `out_OI`; rows of both in one piece."""
    rows, cols = codes_OI.shape
    kernel: Any = _dequantize_blocks
    strides = codes_OI.stride(0), scales.stride(0), out_OI.stride(0)
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(cols, BLOCK))
    kernel[grid](codes_OI, scales, out_OI, *strides, rows, cols, BLOCK=BLOCK, num_warps=8)


def functions(kind: Kind) -> list[Any]:
    """The kernels that pack a kind, in the order of their launches."""
    match kind.kernel:
        case "bfloat16" | "float32":
            return [_copy_blocks]
        case "block":
            return [_quantize_blocks]
        case "channel" if _in_strips(kind):
            return [_quantize_strips]
        case "channel" | "tensor":
            return [_find_amax, _quantize_by_amax]
        case _:
            assert_never(kind.kernel)


def constants(kind: Kind, lora_rank: int) -> dict[str, Any]:
    """What the kernels of a kind are compiled for; each takes a part."""
    rows, cols = _tile(kind)
    return dict(
        DTYPE=TRITON_DTYPES[kind.dtype],
        LORA_DTYPE=TRITON_DTYPES[kind.lora_dtype or torch.float32],
        ROWS=rows,
        COLS=cols,
        LORA_RANK=lora_rank,
        RANK_TILE=min(lora_rank, 32),
        ALIGNED=kind.aligned,
        POWER_OF_TWO=kind.power_of_two,
        BY_ROW=kind.kernel == "channel",
    )


def compile_options(kind: Kind) -> dict[str, int]:
    """With an adapter, the tile and its product share the registers: more warps, and no copies of what comes next."""
    return dict(num_warps=8, num_stages=1) if kind.lora_dtype is None else dict(num_warps=16, num_stages=1)


def _tile(kind: Kind) -> tuple[int, int]:
    """Rows and columns that a program handles at a time."""
    return (4, 2048) if _in_strips(kind) else (BLOCK, BLOCK)


def _in_strips(kind: Kind) -> bool:
    """Whether a program handles whole rows. Not with an adapter: the products want tiles of 64 rows and more."""
    return kind.kernel == "channel" and kind.lora_dtype is None


def _kind(piece: Piece) -> Kind:
    lora_dtype = None if piece.lora is None else piece.lora.a_RI.dtype
    rest = (piece.weight_OI.dtype, lora_dtype, _is_aligned(piece))
    match piece:
        case ToFp8():
            return Kind(piece.form, *rest, piece.power_of_two)
        case ToBfloat16():
            return Kind("bfloat16", *rest, power_of_two=False)
        case ToFloat32():
            return Kind("float32", *rest, power_of_two=False)


def _is_aligned(piece: Piece) -> bool:
    """Whether the compiler may count on multiples of 16 in every address of the piece."""
    weight_OI, lora = piece.weight_OI, piece.lora
    numbers = [weight_OI.data_ptr(), weight_OI.stride(0), weight_OI.shape[1], _out(piece)]
    if lora is not None:
        numbers += [lora.a_RI.data_ptr(), lora.a_RI.stride(0)]
    return weight_OI.stride(1) == 1 and not any(number % 16 for number in numbers)


def _out(piece: Piece) -> int:
    """Where the piece begins in the bucket, in elements of what is written."""
    return piece.offset // ITEM_BYTES[type(piece)]


def _launch(kind: Kind, members: Sequence[tuple[int, Piece]]) -> Launch:
    rows, cols = _tile(kind)
    device = members[0][1].weight_OI.device
    table, programs, first_program, num_maxima = [], [], 0, 0
    for index, piece in members:
        num_rows, num_cols = piece.weight_OI.shape
        table.append(_table_row(index, piece, first_program, num_maxima))
        programs.append(-(-num_rows // rows) * (1 if _in_strips(kind) else -(-num_cols // cols)))
        first_program += programs[-1]
        num_maxima += {"channel": num_rows, "tensor": 1}.get(kind.kernel, 0)
    indices_P = torch.arange(len(members), dtype=torch.int32)
    return Launch(
        kind,
        max(0 if piece.lora is None else _padded(piece.lora.a_RI.shape[0]) for _, piece in members),
        indices_P.repeat_interleave(torch.tensor(programs)).to(device),
        torch.tensor(table, dtype=torch.int64).to(device),
        num_maxima,
        tuple(piece for _, piece in members),
    )


def _padded(lora_rank: int) -> int:
    return max(16, triton.next_power_of_2(lora_rank))


def _table_row(index: int, piece: Piece, first_program: int, first_amax: int) -> list[int]:
    """The numbers of a piece, in the order of the constants below."""
    weight_OI = piece.weight_OI
    scale_out = piece.scale_offset // 4 if isinstance(piece, ToFp8) else 0
    row = [weight_OI.data_ptr(), *weight_OI.stride(), *weight_OI.shape, _out(piece), scale_out]
    return [*row, first_program, index, first_amax, *_lora_numbers(piece.lora)]


def _lora_numbers(lora: Lora | None) -> list[int]:
    if lora is None:
        return [0] * 6
    a_RI, b_OR, scale = lora
    return [a_RI.data_ptr(), a_RI.stride(0), b_OR.data_ptr(), b_OR.stride(0), len(a_RI), _float_bits(scale)]


def _float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


POINTERS = {
    "codes_ptr": "*fp8e4nv",
    "scales_ptr": "*fp32",
    "out_ptr": "*bf16",
    "amax_ptr": "*i32",
    "flags_ptr": "*i32",
    "piece_of_program_ptr": "*i32",
    "table_ptr": "*i64",
}


def production() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """The launches that syncs of Qwen3 and Llama models make, and what unaligned weights fall back to.

    Of each: its name, the kernel, the types of its arguments, its constants, its compile options.
    """
    bfloat16, float32 = torch.bfloat16, torch.float32
    kinds = [
        (Kind("block", bfloat16, None, True, False), 0),
        (Kind("block", float32, None, True, False), 0),
        (Kind("block", bfloat16, None, True, True), 0),
        (Kind("block", bfloat16, float32, True, False), 16),
        (Kind("block", bfloat16, float32, True, False), 64),
        (Kind("block", bfloat16, float32, True, False), 128),
        (Kind("channel", bfloat16, None, True, False), 0),
        (Kind("channel", bfloat16, float32, True, False), 16),
        (Kind("tensor", bfloat16, None, True, False), 0),
        (Kind("bfloat16", bfloat16, None, True, False), 0),
        (Kind("bfloat16", bfloat16, float32, True, False), 16),
        (Kind("block", bfloat16, None, False, False), 0),
    ]
    for kind, lora_rank in kinds:
        arguments = constants(kind, lora_rank)
        for function in functions(kind):
            types = {name: POINTERS[name] for name in function.arg_names if name in POINTERS}
            wanted = {name: value for name, value in arguments.items() if name in function.arg_names}
            yield _form_name(function, kind, lora_rank), function, types, wanted, compile_options(kind)
    types = dict(codes_ptr="*fp8e4nv", scales_ptr="*fp32", out_ptr="*bf16")
    types |= dict.fromkeys(("codes_stride", "scales_stride", "out_stride", "num_rows", "num_cols"), "i32")
    yield "dequantize_blocks", _dequantize_blocks, types, dict(BLOCK=BLOCK), dict(num_warps=8)


def _form_name(function: Any, kind: Kind, lora_rank: int) -> str:
    words = [function.__name__.lstrip("_"), str(kind.dtype).removeprefix("torch.")]
    words += [kind.kernel] * (kind.kernel in ("channel", "tensor")) + [f"rank {lora_rank}"] * (lora_rank > 0)
    return ", ".join([*words, *["power of two"] * kind.power_of_two, *["unaligned"] * (not kind.aligned)])


SOURCE = tl.constexpr(0)
ROW_STRIDE = tl.constexpr(1)
COL_STRIDE = tl.constexpr(2)
NUM_ROWS = tl.constexpr(3)
NUM_COLS = tl.constexpr(4)
OUT = tl.constexpr(5)
SCALE_OUT = tl.constexpr(6)
FIRST_PROGRAM = tl.constexpr(7)
FLAG = tl.constexpr(8)
AMAX = tl.constexpr(9)
LORA_A = tl.constexpr(10)
LORA_A_STRIDE = tl.constexpr(11)
LORA_B = tl.constexpr(12)
LORA_B_STRIDE = tl.constexpr(13)
RANK = tl.constexpr(14)
LORA_SCALE = tl.constexpr(15)
TABLE_WIDTH = tl.constexpr(16)

UNALIGNED = tl.constexpr(False)
LARGEST_CODE = tl.constexpr(E4M3_MAX)
INVERSE_OF_LARGEST = tl.constexpr(1 / E4M3_MAX)
SMALLEST_AMAX_BITS = tl.constexpr(_float_bits(SMALLEST_AMAX))
INFINITY_BITS = tl.constexpr(0x7F800000)
MANTISSA_BITS = tl.constexpr(0x7FFFFF)


@triton.jit
def _quantize_blocks(
    codes_ptr,
    scales_ptr,
    flags_ptr,
    piece_of_program_ptr,
    table_ptr,
    POWER_OF_TWO: tl.constexpr,
    DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LORA_RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block, one scale."""
    row_ptr, block, row, col = _find_block(piece_of_program_ptr, table_ptr, ROWS, COLS, ALIGNED)
    x = _load(row_ptr, row, col, DTYPE, LORA_DTYPE, ROWS, COLS, LORA_RANK, RANK_TILE, ALIGNED)
    amax_bits = tl.max(tl.max(_magnitude(x), axis=1), axis=0)
    scale = _scale(amax_bits, POWER_OF_TWO)
    tl.store(scales_ptr + tl.load(row_ptr + SCALE_OUT) + block, scale)
    _flag(flags_ptr, row_ptr, amax_bits)
    _store(codes_ptr, row_ptr, row, col, _codes(x, tl.div_rn(1.0, scale)), ROWS, COLS, ALIGNED)


@triton.jit
def _quantize_strips(
    codes_ptr,
    scales_ptr,
    flags_ptr,
    piece_of_program_ptr,
    table_ptr,
    POWER_OF_TWO: tl.constexpr,
    DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LORA_RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Whole rows, a scale each: the second reading finds them in the cache."""
    row_ptr, strip = _find_piece(piece_of_program_ptr, table_ptr)
    row = strip * ROWS
    num_cols = tl.load(row_ptr + NUM_COLS)
    amax_bits = tl.zeros([ROWS], tl.int32)
    for col in range(0, num_cols, COLS):
        x = _load(row_ptr, row, col, DTYPE, LORA_DTYPE, ROWS, COLS, LORA_RANK, RANK_TILE, ALIGNED)
        amax_bits = tl.maximum(amax_bits, tl.max(_magnitude(x), axis=1))
    scale = _scale(amax_bits, POWER_OF_TWO)
    rows = row + tl.arange(0, ROWS)
    row_mask = rows < tl.load(row_ptr + NUM_ROWS)
    tl.store(scales_ptr + tl.load(row_ptr + SCALE_OUT) + rows, scale, mask=row_mask)
    _flag(flags_ptr, row_ptr, tl.max(amax_bits, axis=0))
    inverse = tl.div_rn(1.0, scale)
    for col in range(0, num_cols, COLS):
        x = _load(row_ptr, row, col, DTYPE, LORA_DTYPE, ROWS, COLS, LORA_RANK, RANK_TILE, ALIGNED)
        _store(codes_ptr, row_ptr, row, col, _codes(x, inverse[:, None]), ROWS, COLS, ALIGNED)


@triton.jit
def _find_amax(
    amax_ptr,
    flags_ptr,
    piece_of_program_ptr,
    table_ptr,
    BY_ROW: tl.constexpr,
    DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LORA_RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The bits of the largest magnitude of a tensor or of each row; a maximum of integers is the same in any order."""
    row_ptr, _, row, col = _find_block(piece_of_program_ptr, table_ptr, ROWS, COLS, ALIGNED)
    x = _load(row_ptr, row, col, DTYPE, LORA_DTYPE, ROWS, COLS, LORA_RANK, RANK_TILE, ALIGNED)
    row_bits = tl.max(_magnitude(x), axis=1)
    amax_bits = tl.max(row_bits, axis=0)
    amax_ptr += tl.load(row_ptr + AMAX)
    if BY_ROW:
        rows = row + tl.arange(0, ROWS)
        tl.atomic_max(amax_ptr + rows, row_bits, mask=rows < tl.load(row_ptr + NUM_ROWS))
    else:
        tl.atomic_max(amax_ptr, amax_bits)
    _flag(flags_ptr, row_ptr, amax_bits)


@triton.jit
def _quantize_by_amax(
    codes_ptr,
    scales_ptr,
    amax_ptr,
    piece_of_program_ptr,
    table_ptr,
    BY_ROW: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LORA_RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block of a tensor whose amax is known."""
    row_ptr, _, row, col = _find_block(piece_of_program_ptr, table_ptr, ROWS, COLS, ALIGNED)
    x = _load(row_ptr, row, col, DTYPE, LORA_DTYPE, ROWS, COLS, LORA_RANK, RANK_TILE, ALIGNED)
    amax_ptr += tl.load(row_ptr + AMAX)
    scales_ptr += tl.load(row_ptr + SCALE_OUT)
    if BY_ROW:
        rows = row + tl.arange(0, ROWS)
        num_rows = tl.load(row_ptr + NUM_ROWS)
        scale = _scale(tl.load(amax_ptr + rows, mask=rows < num_rows, other=0), POWER_OF_TWO)
        tl.store(scales_ptr + rows, scale, mask=rows < tl.where(col == 0, num_rows, 0))
        codes = _codes(x, tl.div_rn(1.0, scale)[:, None])
    else:
        scale = _scale(tl.load(amax_ptr), POWER_OF_TWO)
        tl.store(scales_ptr, scale, mask=row + col == 0)
        codes = _codes(x, tl.div_rn(1.0, scale))
    _store(codes_ptr, row_ptr, row, col, codes, ROWS, COLS, ALIGNED)


@triton.jit
def _copy_blocks(
    out_ptr,
    flags_ptr,
    piece_of_program_ptr,
    table_ptr,
    DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LORA_RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block, not quantised."""
    row_ptr, _, row, col = _find_block(piece_of_program_ptr, table_ptr, ROWS, COLS, ALIGNED)
    x = _load(row_ptr, row, col, DTYPE, LORA_DTYPE, ROWS, COLS, LORA_RANK, RANK_TILE, ALIGNED)
    x = x.to(out_ptr.dtype.element_ty)
    _flag(flags_ptr, row_ptr, tl.max(tl.max(_magnitude(x.to(tl.float32)), axis=1), axis=0))
    _store(out_ptr, row_ptr, row, col, x, ROWS, COLS, ALIGNED)


@triton.jit
def _dequantize_blocks(
    codes_ptr,
    scales_ptr,
    out_ptr,
    codes_stride,
    scales_stride,
    out_stride,
    num_rows,
    num_cols,
    BLOCK: tl.constexpr,
):
    """One block, one scale."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < num_cols)
    codes = tl.load(codes_ptr + rows * codes_stride + cols, mask=mask, other=0.0)
    scale = tl.load(scales_ptr + tl.program_id(0) * scales_stride + tl.program_id(1))
    tl.store(out_ptr + rows * out_stride + cols, (codes.to(tl.float32) * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _find_piece(piece_of_program_ptr, table_ptr):
    """The piece's row of the table, and which of the piece's programs this one is."""
    program = tl.program_id(0)
    row_ptr = table_ptr + tl.load(piece_of_program_ptr + program).to(tl.int64) * TABLE_WIDTH
    return row_ptr, program - tl.load(row_ptr + FIRST_PROGRAM)


@triton.jit
def _find_block(piece_of_program_ptr, table_ptr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr):
    """The piece's row of the table, the block's index in the piece, its first row and column."""
    row_ptr, block = _find_piece(piece_of_program_ptr, table_ptr)
    blocks_across = tl.cdiv(tl.load(row_ptr + NUM_COLS), COLS).to(tl.int32)
    block_row = block.to(tl.int32) // blocks_across
    block_col = block.to(tl.int32) % blocks_across
    return row_ptr, block, block_row.to(tl.int64) * ROWS, block_col.to(tl.int64) * COLS


@triton.jit
def _number(row_ptr, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """A number of the table; the compiler takes our word for multiples of 16."""
    number = tl.load(row_ptr + COLUMN)
    if ALIGNED:
        number = tl.multiple_of(number, 16)
    return number


@triton.jit
def _pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _number(row_ptr, COLUMN, ALIGNED).to(tl.pointer_type(DTYPE))  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(
    row_ptr,
    row,
    col,
    DTYPE: tl.constexpr,
    LORA_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LORA_RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A tile of W, or of W + s · B A rounded to W's dtype, in float32; zeros beyond the edges."""
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    row_mask = rows[:, None] < tl.load(row_ptr + NUM_ROWS)
    col_mask = cols[None, :] < _number(row_ptr, NUM_COLS, ALIGNED)
    delta = tl.zeros([ROWS, COLS], tl.float32)
    if LORA_RANK > 0:  # before W is loaded, so that the loop has the registers for itself
        lora_rank = tl.load(row_ptr + RANK)
        a_ptr = _pointer(row_ptr, LORA_A, LORA_DTYPE, ALIGNED)
        b_ptr = _pointer(row_ptr, LORA_B, LORA_DTYPE, UNALIGNED)
        a_stride = _number(row_ptr, LORA_A_STRIDE, ALIGNED)
        b_stride = tl.load(row_ptr + LORA_B_STRIDE)
        for start in range(0, LORA_RANK, RANK_TILE):
            ranks = start + tl.arange(0, RANK_TILE)
            b_mask = row_mask & (ranks[None, :] < lora_rank)
            a_mask = (ranks[:, None] < lora_rank) & col_mask
            b = tl.load(b_ptr + rows[:, None] * b_stride + ranks[None, :], mask=b_mask, other=0.0)
            a = tl.load(a_ptr + ranks[:, None] * a_stride + cols[None, :], mask=a_mask, other=0.0)
            delta = tl.dot(b.to(DTYPE), a.to(DTYPE), delta, input_precision="ieee")
    source_ptr = _pointer(row_ptr, SOURCE, DTYPE, ALIGNED)
    if ALIGNED:
        offsets = rows[:, None] * _number(row_ptr, ROW_STRIDE, ALIGNED) + cols[None, :]
    else:
        offsets = rows[:, None] * tl.load(row_ptr + ROW_STRIDE) + cols[None, :] * tl.load(row_ptr + COL_STRIDE)
    x = tl.load(source_ptr + offsets, mask=row_mask & col_mask, other=0.0).to(tl.float32)
    if LORA_RANK > 0:
        lora_scale = tl.load(row_ptr + LORA_SCALE).to(tl.int32).to(tl.float32, bitcast=True)
        x = (x + lora_scale * delta).to(DTYPE).to(tl.float32)
    return x


@triton.jit
def _store(out_ptr, row_ptr, row, col, values, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of a row-major matrix in the bucket, up to the edges."""
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    num_cols = _number(row_ptr, NUM_COLS, ALIGNED)
    row_mask = rows[:, None] < tl.load(row_ptr + NUM_ROWS)
    col_mask = cols[None, :] < num_cols
    offsets = _number(row_ptr, OUT, ALIGNED) + rows[:, None] * num_cols + cols[None, :]
    tl.store(out_ptr + offsets, values, mask=row_mask & col_mask)


@triton.jit
def _magnitude(x):
    """|x| as bits: they are ordered like the values, with infinity and then NaN on top, which a float maximum drops."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(amax_bits, POWER_OF_TWO: tl.constexpr):
    amax = tl.maximum(amax_bits, SMALLEST_AMAX_BITS).to(tl.float32, bitcast=True)
    scale = amax * INVERSE_OF_LARGEST
    if POWER_OF_TWO:
        rounded = (scale.to(tl.int32, bitcast=True) + MANTISSA_BITS) & INFINITY_BITS
        scale = tl.where(amax_bits < INFINITY_BITS, rounded.to(tl.float32, bitcast=True), scale)
    return scale


@triton.jit
def _codes(x, inverse):
    return tl.clamp(x * inverse, -LARGEST_CODE, LARGEST_CODE).to(tl.float8e4nv)


@triton.jit
def _flag(flags_ptr, row_ptr, amax_bits):
    tl.store(flags_ptr + tl.load(row_ptr + FLAG), 1, mask=amax_bits >= INFINITY_BITS)
