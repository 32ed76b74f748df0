"""The fused LoRA steps in Triton: small products that read x and dy once, and a large product with a low-rank tail.

T: tokens; I, O: inputs and outputs; Q: outputs of one projection; P: projections; R: ranks side by side, as in
layout.py; C: columns of what a small product reads, I or Q; B: blocks of rows; D: adapters; G: parts of a sum.

Each block of rows lies inside one segment, so that it has one adapter, of whose ranks alone it takes notice. Nothing is
added atomically: parts of a sum are written side by side and added in a fixed order.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from xorl_kernels import tuning
from xorl_kernels.fused_lora.layout import Layout, Span, gradient_of, padded

PROGRAMS = 264
"""As many as a small product is cut into at least: two for each multiprocessor of an H100."""

RANKS_IN_PASSING = 32
"""Up to this rank dy's one reading gives dB too; above it the partial sums would be as large as a second reading."""

MAX_TERMS = 3
"""Projections that the fused product takes: q, k and v."""


class Tile(NamedTuple):
    """What a program of the large product handles at a time."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


LARGE_TILE = Tile(128, 256, 64, 8, 3)  # Ampere has no registers for it
TILES = (LARGE_TILE, Tile(128, 128, 64, 8, 4), Tile(64, 128, 32, 4, 4))
TAIL_TILE = Tile(64, 128, 64, 4, 1)

Route = Tile | None
"""How the large product is computed: with its tail in one kernel of these tiles, or by cuBLAS and the tail added."""

ROUTES: tuple[Route, ...] = (None, *TILES)


class Small(NamedTuple):
    """What a program of a small product handles at a time."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


ALONE = Small(128, 128, 8, 3)
WITH_MANY_RANKS = Small(64, 128, 8, 3)
IN_PASSING = Small(256, 64, 8, 4)
SUMS = Small(64, 128, 4, 1)


class Blocks(NamedTuple):
    """Rows cut into blocks, those of one adapter in succession."""

    table: Tensor  # int32 [B, 4]: start, stop, adapter, bits of scale
    first_block_D: Tensor  # int32 [D + 1]


def shrink(x_TI: Tensor, layout: Layout) -> Tensor:
    """s = scale · x Aᵀ, [T, R]: one reading of x for all projections. Undefined where there is no adapter."""
    s_TR = torch.empty(len(x_TI), layout.num_ranks, dtype=x_TI.dtype, device=x_TI.device)
    _project(x_TI, s_TR, layout, (0, len(layout.sizes)), A)
    return s_TR


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    s_TR: Tensor,
    layout: Layout,
    routes: Sequence[Route] = ROUTES,
) -> Tensor:
    """y = x Wᵀ + b + s Bᵀ, [T, O], by the fastest of `routes`."""

    def run(route: Route) -> Tensor:
        if route is None:
            y_TO = F.linear(x_TI, weight_OI, bias_O)
            _product(y_TO, [], None, s_TR, layout, TAIL_TILE, backward=False)
        else:
            y_TO = torch.empty(len(x_TI), len(weight_OI), dtype=x_TI.dtype, device=x_TI.device)
            _product(y_TO, [(x_TI, weight_OI)], bias_O, s_TR, layout, route, backward=False)
        return y_TO

    return _fastest("linear", run, routes, x_TI, weight_OI, layout)


def up_gradients(dys: Sequence[Tensor], s_TR: Tensor, layout: Layout) -> Tensor:
    """ds = scale · dy B, [T, R], and dB += dyᵀ s: one reading of each dy, two above RANKS_IN_PASSING."""
    ds_TR = torch.empty_like(s_TR)
    for p, dy_TQ in enumerate(dys):
        part = (p, p + 1)
        if 0 < _most_ranks(layout, part) <= RANKS_IN_PASSING:
            _project(dy_TQ, ds_TR, layout, part, B, s_TR)
        else:
            _project(dy_TQ, ds_TR, layout, part, B)
            _accumulate(dy_TQ, s_TR, layout, part, DB)
    return ds_TR


def down_gradients(x_TI: Tensor, ds_TR: Tensor, layout: Layout) -> None:
    """dA += dsᵀ x: one reading of x for all projections."""
    _accumulate(x_TI, ds_TR, layout, (0, len(layout.sizes)), DA)


def input_gradient(
    dys: Sequence[Tensor],
    weight_OI: Tensor,
    ds_TR: Tensor,
    layout: Layout,
    routes: Sequence[Route] = ROUTES,
) -> Tensor:
    """dx = dy W + ds A, [T, I], by the fastest of `routes`."""
    terms = list(zip(dys, weight_OI.split(layout.sizes), strict=True))

    def run(route: Route) -> Tensor:
        if route is None:
            dx_TI = terms[0][0] @ terms[0][1]
            for dy_TQ, weight_QI in terms[1:]:
                dx_TI.addmm_(dy_TQ, weight_QI)
            _product(dx_TI, [], None, ds_TR, layout, TAIL_TILE, backward=True)
        else:
            dx_TI = torch.empty(len(ds_TR), weight_OI.shape[1], dtype=weight_OI.dtype, device=weight_OI.device)
            _product(dx_TI, terms, None, ds_TR, layout, route, backward=True)
        return dx_TI

    return _fastest("input_gradient", run, routes if len(terms) <= MAX_TERMS else (None,), dys[0], weight_OI, layout)


def _fastest(
    step: str,
    run: Callable[[Route], Tensor],
    routes: Sequence[Route],
    rows: Tensor,
    weight_OI: Tensor,
    layout: Layout,
) -> Tensor:
    """Tokens and ranks count by their order of magnitude, so that no two batches of a kind are measured apart."""
    if weight_OI.is_cuda and torch.cuda.get_device_capability(weight_OI.device) < (9, 0):
        routes = [route for route in routes if route is not LARGE_TILE]
    if len(routes) == 1:
        return run(routes[0])
    sizes = (*weight_OI.shape, len(rows).bit_length(), layout.num_ranks, len(layout.sizes))
    candidates = {
        "cuBLAS" if route is None else str(tuple(route)): (lambda route=route: run(route)) for route in routes
    }
    return candidates[tuning.fastest(f"fused_lora.{step} {sizes}", candidates, rows.device)]()


def _most_ranks(layout: Layout, part: tuple[int, int]) -> int:
    """Of any adapter in the projections of a part."""
    return max((padded(columns[part[1] - 1].stop) - columns[part[0]].start for columns in layout.columns), default=0)


def _rank_tile(num_ranks: int) -> int:
    return min(64, max(16, triton.next_power_of_2(num_ranks)))


def _project(
    x_TC: Tensor, out_TR: Tensor, layout: Layout, part: tuple[int, int], side: int, s_TR: Tensor | None = None
) -> None:
    """out = scale · x Fᵀ, F being the factors of one side; with `s_TR` also F.grad += xᵀ s from the same reading."""
    num_ranks = _most_ranks(layout, part)
    if num_ranks == 0:
        return
    x_TC = _with_whole_rows(x_TC)
    (num_tokens, num_cols), device = x_TC.shape, x_TC.device
    ranks = _rank_tile(num_ranks)
    small = IN_PASSING if s_TR is not None else ALONE if ranks < 64 else WITH_MANY_RANKS
    blocks, rank_tiles = _blocks_of(layout, small.rows, device), -(-num_ranks // ranks)
    programs = len(blocks.table) * rank_tiles
    cols_each = small.cols * -(-num_cols // (small.cols * -(-PROGRAMS // programs)))
    num_parts = -(-num_cols // cols_each)
    sums_GTR = torch.empty(num_parts, num_tokens, out_TR.shape[1], device=device)
    outer_BCR = None if s_TR is None else torch.empty(len(blocks.table), num_cols, ranks, device=device)
    table, in_pieces = _table_of(layout, device)
    shared = dict(
        table_ptr=table, blocks_ptr=blocks.table, first_p=part[0], last_p=part[1], PROJECTIONS=len(layout.sizes)
    )
    _launch(
        _project_kernel,
        (rank_tiles, len(blocks.table), num_parts),
        small,
        x_ptr=x_TC,
        x_stride=x_TC.stride(0),
        num_cols=num_cols,
        cols_each=cols_each,
        sums_ptr=sums_GTR,
        s_ptr=sums_GTR if s_TR is None else s_TR,
        outer_ptr=sums_GTR if outer_BCR is None else outer_BCR,
        num_tokens=num_tokens,
        sums_stride=out_TR.shape[1],
        **shared,
        **_project_constants(side, small, ranks, num_cols, in_pieces[side], s_TR is not None),
    )
    _launch(
        _sum_parts_kernel,
        (len(blocks.table) * small.rows // SUMS.rows, rank_tiles),
        SUMS,
        sums_ptr=sums_GTR,
        out_ptr=out_TR,
        num_parts=num_parts,
        num_tokens=num_tokens,
        sums_stride=out_TR.shape[1],
        **shared,
        BLOCK_ROWS=small.rows,
        ROWS=SUMS.rows,
        RANKS=ranks,
    )
    if outer_BCR is not None:
        _add_sums(outer_BCR, blocks, layout, part, DB)


def _project_constants(
    side: int, small: Small, ranks: int, num_cols: int, in_pieces: bool, in_passing: bool
) -> dict[str, Any]:
    return dict(
        SIDE=side,
        IN_PASSING=in_passing,
        IN_PIECES=in_pieces,
        EVEN=num_cols % small.cols == 0,
        ROWS=small.rows,
        COLS=small.cols,
        RANKS=ranks,
    )


def _accumulate(x_TC: Tensor, s_TR: Tensor, layout: Layout, part: tuple[int, int], side: int) -> None:
    """F.grad += xᵀ s, F being the factors of one side."""
    num_ranks = _most_ranks(layout, part)
    if num_ranks == 0 or not _any_trained(layout, part, side):
        return
    x_TC = _with_whole_rows(x_TC)
    num_cols, device = x_TC.shape[1], x_TC.device
    ranks = _rank_tile(num_ranks)
    rank_tiles, col_tiles = -(-num_ranks // ranks), -(-num_cols // ALONE.cols)
    rows_each = max(8, len(x_TC) * rank_tiles * col_tiles // (PROGRAMS * ALONE.rows)) * ALONE.rows
    blocks = _blocks_of(layout, rows_each, device)
    table, _ = _table_of(layout, device)
    outer_BCR = torch.empty(len(blocks.table), num_cols, rank_tiles * ranks, device=device)
    _launch(
        _accumulate_kernel,
        (rank_tiles, len(blocks.table), col_tiles),
        ALONE,
        x_ptr=x_TC,
        x_stride=x_TC.stride(0),
        num_cols=num_cols,
        s_ptr=s_TR,
        s_stride=s_TR.shape[1],
        outer_ptr=outer_BCR,
        table_ptr=table,
        blocks_ptr=blocks.table,
        first_p=part[0],
        last_p=part[1],
        PROJECTIONS=len(layout.sizes),
        **_accumulate_constants(ranks, num_cols),
    )
    _add_sums(outer_BCR, blocks, layout, part, side)


def _accumulate_constants(ranks: int, num_cols: int) -> dict[str, Any]:
    return dict(EVEN=num_cols % ALONE.cols == 0, ROWS=ALONE.rows, COLS=ALONE.cols, RANKS=ranks)


def _add_sums(outer_BCR: Tensor, blocks: Blocks, layout: Layout, part: tuple[int, int], side: int) -> None:
    """Add the sums of an adapter's blocks, in their order, to its gradient."""
    table, in_pieces = _table_of(layout, outer_BCR.device, gradients=True)
    _, num_cols, width = outer_BCR.shape
    ranks = min(width, 32)
    _launch(
        _add_sums_kernel,
        (len(layout.adapters), -(-num_cols // SUMS.cols), width // ranks),
        SUMS,
        outer_ptr=outer_BCR,
        num_cols=num_cols,
        width=width,
        first_block_ptr=blocks.first_block_D,
        table_ptr=table,
        first_p=part[0],
        last_p=part[1],
        PROJECTIONS=len(layout.sizes),
        SIDE=side,
        IN_PIECES=in_pieces[side],
        COLS=SUMS.cols,
        RANKS=ranks,
    )


def _product(
    out_TN: Tensor,
    terms: Sequence[tuple[Tensor, Tensor]],
    bias_N: Tensor | None,
    s_TR: Tensor,
    layout: Layout,
    tile: Tile,
    *,
    backward: bool,
) -> None:
    """out = Σ x W + b + s F over the terms; without terms, out += s F.

    Forward, W is Wᵀ of the term, and F of a projection is its Bᵀ; backward, W is W, and F is A.
    """
    blocks = _blocks_of(layout, tile.rows, out_TN.device, with_gaps=bool(terms))
    if len(blocks.table) == 0:
        return
    ends = (0, out_TN.shape[1]) if backward else layout.outputs
    columns = _columns(ends, tile.cols, backward, len(layout.sizes), out_TN.device)
    table, in_pieces = _table_of(layout, out_TN.device)
    side = A if backward else B
    given = [(_with_whole_rows(x), _with_whole_rows(weight)) for x, weight in terms]
    x0, x1, x2 = [*given, *[(out_TN, out_TN)] * MAX_TERMS][:MAX_TERMS]
    _launch(
        _product_kernel,
        (len(blocks.table) * len(columns),),
        tile,
        out_ptr=out_TN,
        out_stride=out_TN.stride(0),
        x0_ptr=x0[0],
        x0_stride=x0[0].stride(0),
        depth0=x0[0].shape[1],
        weight0_ptr=x0[1],
        x1_ptr=x1[0],
        x1_stride=x1[0].stride(0),
        depth1=x1[0].shape[1],
        weight1_ptr=x1[1],
        x2_ptr=x2[0],
        x2_stride=x2[0].stride(0),
        depth2=x2[0].shape[1],
        weight2_ptr=x2[1],
        weight_stride=x0[1].stride(0),
        bias_ptr=out_TN if bias_N is None else bias_N,
        s_ptr=s_TR,
        s_stride=s_TR.shape[1],
        table_ptr=table,
        blocks_ptr=blocks.table,
        num_blocks=len(blocks.table),
        columns_ptr=columns,
        num_columns=len(columns),
        **_product_constants(
            tile,
            side,
            num_terms=len(terms),
            projections=len(layout.sizes),
            ranks=min(32, _rank_tile(_most_ranks(layout, (0, len(layout.sizes))))),
            in_pieces=in_pieces[side],
            has_bias=bias_N is not None,
            even_depth=all(x.shape[1] % tile.depth == 0 for x, _ in terms),
            even_cols=all(end % 16 == 0 for end in ends),
        ),
    )


def _product_constants(
    tile: Tile,
    side: int,
    *,
    num_terms: int,
    projections: int,
    ranks: int,
    in_pieces: bool,
    has_bias: bool,
    even_depth: bool,
    even_cols: bool,
) -> dict[str, Any]:
    return dict(
        TERMS=num_terms,
        BACKWARD=side == A,
        PROJECTIONS=projections,
        SIDE=side,
        HAS_BIAS=has_bias,
        IN_PIECES=in_pieces,
        EVEN_DEPTH=even_depth,
        EVEN_COLS=even_cols,
        ROWS=tile.rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        RANKS=ranks,
        GROUP=8,
    )


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile | Small, **arguments: Any) -> None:
    kernel[grid](**arguments, **_options(tile))


def _options(tile: Tile | Small) -> dict[str, int]:
    return dict(num_warps=tile.num_warps, num_stages=tile.num_stages)


def _with_whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


# Tables. They are remembered: the layers of a batch share their blocks, and a layer's factors stay where they are.


def _blocks_of(layout: Layout, rows: int, device: torch.device, with_gaps: bool = False) -> Blocks:
    num_tokens = layout.num_tokens if with_gaps else None
    return _blocks(tuple(layout.spans), len(layout.adapters), num_tokens, rows, device)


@lru_cache(maxsize=256)
def _blocks(
    spans: tuple[Span, ...], num_adapters: int, num_tokens: int | None, rows: int, device: torch.device
) -> Blocks:
    """With `num_tokens`, the tokens between the spans have blocks too, of the adapter behind the last."""
    gaps: list[Span] = []
    if num_tokens is not None:
        ends = [0, *(end for span in spans for end in span[:2]), num_tokens]
        gaps = [Span(*pair, num_adapters, 0.0) for pair in zip(ends[::2], ends[1::2], strict=True)]
    ordered = sorted([*spans, *gaps], key=lambda span: span.adapter)
    table = [
        (start, min(start + rows, span.stop), span.adapter, _float_bits(span.scale))
        for span in ordered
        for start in range(span.start, span.stop, rows)
    ]
    counts = [sum(row[2] < adapter for row in table) for adapter in range(num_adapters + 1)]
    return Blocks(_on(device, table, 4, torch.int32), _on(device, counts, 1, torch.int32).view(-1))


@lru_cache(maxsize=256)
def _columns(ends: tuple[int, ...], cols: int, backward: bool, num_projections: int, device: torch.device) -> Tensor:
    """int32 [N, 5]: start and stop of columns, first and last projection that adds to them, its first column."""
    table = [
        (start, min(start + cols, stop), 0 if backward else p, num_projections if backward else p + 1, first)
        for p, (first, stop) in enumerate(pairwise(ends))
        for start in range(first, stop, cols)
    ]
    return _on(device, table, 5, torch.int32)


A, B, DA, DB = 3, 6, 9, 12
"""Where a table row has the factors' and gradients' address, distance of ranks and distance within a rank."""

SIDE_A, SIDE_B, SIDE_DA, SIDE_DB = (tl.constexpr(side) for side in (A, B, DA, DB))
FIRST = tl.constexpr(0)
LAST = tl.constexpr(1)
NUM_RANKS = tl.constexpr(2)
TABLE_WIDTH = tl.constexpr(15)


def _table_of(layout: Layout, device: torch.device, gradients: bool = False) -> tuple[Tensor, dict[int, bool]]:
    """int64 [(D + 1) P, 15], a row for each projection of each adapter, and whether a side moves in 16-byte pieces."""
    rows: list[int] = []
    for pairs, columns in zip(layout.adapters, layout.columns, strict=True):
        for pair, ranks in zip(pairs, columns, strict=True):
            a_RI, b_OR = pair or (None, None)
            da_RI, db_OR = (gradient_of(x) if gradients and x is not None else None for x in (a_RI, b_OR))
            rows += (ranks.start, padded(ranks.stop), ranks.stop - ranks.start)
            for a, b in ((a_RI, b_OR), (da_RI, db_OR)):
                rows += (0, 0, 0) if a is None else (a.data_ptr(), a.stride(0), a.stride(1))
                rows += (0, 0, 0) if b is None else (b.data_ptr(), b.stride(1), b.stride(0))
    rows += [0] * (TABLE_WIDTH.value * len(layout.sizes))
    return _table(tuple(rows), device)


@lru_cache(maxsize=4096)
def _table(rows: tuple[int, ...], device: torch.device) -> tuple[Tensor, dict[int, bool]]:
    table = torch.tensor(rows, dtype=torch.int64).view(-1, TABLE_WIDTH.value)
    in_pieces = {}
    for side in (A, B, DA, DB):
        there = table[table[:, side] != 0]
        address, between, within = there[:, side : side + 3].unbind(1)
        if side in (A, DA):
            whole = (address % 16 == 0) & (between % 4 == 0) & (within == 1)
        else:
            whole = (address % 16 == 0) & (between == 1) & (within % 4 == 0) & (there[:, NUM_RANKS.value] % 4 == 0)
        in_pieces[side] = bool(whole.all())
    return _on(device, table, TABLE_WIDTH.value, torch.int64), in_pieces


def _any_trained(layout: Layout, part: tuple[int, int], side: int) -> bool:
    index = 0 if side == DA else 1
    return any(pair[index].requires_grad for pairs in layout.adapters for pair in pairs[slice(*part)] if pair)


def _on(device: torch.device, rows: Any, width: int, dtype: torch.dtype) -> Tensor:
    """A small table on the device, without waiting for it."""
    table = torch.as_tensor(rows, dtype=dtype).view(-1, width)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


POINTERS = {"table_ptr": "*i64", "blocks_ptr": "*i32", "columns_ptr": "*i32", "first_block_ptr": "*i32"}
POINTERS |= {"sums_ptr": "*fp32", "outer_ptr": "*fp32"}


def production() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """The launches that training of Qwen3 and Llama models makes: name, kernel, types, constants and options."""
    for ranks in (16, 32, 64):
        alone = ALONE if ranks < 64 else WITH_MANY_RANKS
        forms = [("project x", A, alone), ("project dy", B, alone)]
        forms += [("project dy in passing", B, IN_PASSING)] * (ranks <= RANKS_IN_PASSING)
        for name, side, small in forms:
            constants = _project_constants(side, small, ranks, 4096, True, small is IN_PASSING)
            yield _form(f"{name}, rank {ranks}", _project_kernel, constants, small)
        yield _form(f"accumulate, rank {ranks}", _accumulate_kernel, _accumulate_constants(ranks, 4096), ALONE)
    for tile in TILES:
        for name, side, num_terms in (("y", B, 1), ("dx", A, 1), ("dx of two", A, 2), ("dx of three", A, 3)):
            yield _product_form(f"{name}, rank 16", tile, side, num_terms, 16)
        yield _product_form("y, rank 32", tile, B, 1, 32)
    for name, side in (("add to y", B), ("add to dx", A)):
        yield _product_form(f"{name}, rank 16", TAIL_TILE, side, 0, 16)
    yield _form("sum parts", _sum_parts_kernel, dict(BLOCK_ROWS=ALONE.rows, ROWS=SUMS.rows, RANKS=16), SUMS)
    yield _form("add sums to A", _add_sums_kernel, dict(SIDE=DA, IN_PIECES=True, COLS=SUMS.cols, RANKS=16), SUMS)
    yield _form("add sums to B", _add_sums_kernel, dict(SIDE=DB, IN_PIECES=True, COLS=SUMS.cols, RANKS=16), SUMS)


def _product_form(name: str, tile: Tile, side: int, num_terms: int, ranks: int) -> Any:
    constants = _product_constants(
        tile,
        side,
        num_terms=num_terms,
        projections=3,
        ranks=ranks,
        in_pieces=True,
        has_bias=False,
        even_depth=True,
        even_cols=True,
    )
    where = ", from sm_90 on" if tile is LARGE_TILE else ""
    return _form(f"{name}, {tile.rows}x{tile.cols}{where}", _product_kernel, constants, tile)


def _form(name: str, function: Any, constants: dict[str, Any], tile: Tile | Small) -> Any:
    constants = {"PROJECTIONS": 3, **constants}
    types = {
        argument: POINTERS.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        for argument in function.arg_names
        if argument not in constants
    }
    return name, function, types, constants, _options(tile)


@triton.jit
def _block(blocks_ptr, index):
    """Start, stop and adapter of a block of rows."""
    row_ptr = blocks_ptr + index * 4
    return tl.load(row_ptr).to(tl.int64), tl.load(row_ptr + 1).to(tl.int64), tl.load(row_ptr + 2).to(tl.int64)


@triton.jit
def _scale(blocks_ptr, index):
    return tl.load(blocks_ptr + index * 4 + 3).to(tl.float32, bitcast=True)


@triton.jit
def _rank_range(table_ptr, adapter, first_p, last_p, PROJECTIONS: tl.constexpr):
    """Where an adapter's ranks of some projections lie in s."""
    first = tl.load(table_ptr + (adapter * PROJECTIONS + first_p) * TABLE_WIDTH + FIRST)
    last = tl.load(table_ptr + (adapter * PROJECTIONS + last_p - 1) * TABLE_WIDTH + LAST)
    return tl.multiple_of(first, 8), tl.multiple_of(last, 8)


@triton.jit
def _factors(
    table_ptr, adapter, ranks, first_p, last_p, SIDE: tl.constexpr, PROJECTIONS: tl.constexpr, IN_PIECES: tl.constexpr
):
    """Pointers to an adapter's ranks, the distance of a rank's elements, and a mask of the ranks that are there.

    Elements of A lie side by side within a rank, those of B across the ranks of its one projection.
    """
    row_ptr = table_ptr + (adapter * PROJECTIONS + first_p) * TABLE_WIDTH
    if IN_PIECES and (SIDE == SIDE_B or SIDE == SIDE_DB):  # noqa: SIM109 - Triton has no `in`
        first = tl.multiple_of(tl.load(row_ptr + FIRST), 8)
        num_ranks = tl.multiple_of(tl.load(row_ptr + NUM_RANKS), 4)
        address = tl.multiple_of(tl.load(row_ptr + SIDE), 16)
        num_ranks = tl.where(address == 0, 0, num_ranks)
        strides = tl.multiple_of(tl.load(row_ptr + SIDE + 2), 4)
        pointers = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + (ranks - first)
        mask = ranks < first + num_ranks
    else:
        addresses = tl.zeros_like(ranks)
        strides = tl.zeros_like(ranks)
        for _ in range(first_p, last_p):
            first = tl.load(row_ptr + FIRST)
            address = tl.load(row_ptr + SIDE)
            inside = (ranks >= first) & (ranks < first + tl.load(row_ptr + NUM_RANKS)) & (address != 0)
            addresses = tl.where(inside, address + (ranks - first) * tl.load(row_ptr + SIDE + 1) * 4, addresses)
            strides = tl.where(inside, tl.load(row_ptr + SIDE + 2), strides)
            row_ptr += TABLE_WIDTH
        mask = addresses != 0
        pointers = addresses.to(tl.pointer_type(tl.float32))
        if IN_PIECES:
            pointers = tl.multiple_of(pointers, 16)
        strides = strides[:, None]
    return pointers, strides, mask


@triton.jit
def _elements(pointers, strides, cols, SIDE: tl.constexpr, IN_PIECES: tl.constexpr):
    """Pointers [R, C] to the elements `cols` of each rank."""
    if IN_PIECES and (SIDE == SIDE_A or SIDE == SIDE_DA):  # noqa: SIM109 - Triton has no `in`
        return pointers[:, None] + cols[None, :]
    return pointers[:, None] + cols[None, :] * strides


@triton.jit
def _project_kernel(
    x_ptr,
    x_stride,
    num_cols,
    cols_each,
    sums_ptr,
    s_ptr,
    outer_ptr,
    num_tokens,
    sums_stride,
    table_ptr,
    blocks_ptr,
    first_p,
    last_p,
    PROJECTIONS: tl.constexpr,
    SIDE: tl.constexpr,
    IN_PASSING: tl.constexpr,
    IN_PIECES: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """sums[g] = x Fᵀ over the g-th part of the columns; in passing, outer[b] = xᵀ s of the block."""
    block = tl.program_id(1)
    part = tl.program_id(2)
    start, stop, adapter = _block(blocks_ptr, block)
    first, last = _rank_range(table_ptr, adapter, first_p, last_p, PROJECTIONS)
    ranks = first + tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    if first + tl.program_id(0) * RANKS >= last:
        return
    f_ptrs, strides, f_mask = _factors(table_ptr, adapter, ranks, first_p, last_p, SIDE, PROJECTIONS, IN_PIECES)
    rows = start + tl.arange(0, ROWS)
    row_mask = rows < stop
    rank_mask = ranks < last
    offsets = rows[:, None] * sums_stride + ranks[None, :]
    mask = row_mask[:, None] & rank_mask[None, :]
    sums = tl.zeros([ROWS, RANKS], tl.float32)
    if IN_PASSING:
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0)
    for col in range(part * cols_each, tl.minimum((part + 1) * cols_each, num_cols), COLS):
        cols = col + tl.arange(0, COLS)
        x_mask = row_mask[:, None]
        mask_here = f_mask[:, None]
        if not EVEN:
            x_mask = x_mask & (cols < num_cols)[None, :]
            mask_here = mask_here & (cols < num_cols)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=x_mask, other=0.0)
        f = tl.load(_elements(f_ptrs, strides, cols, SIDE, IN_PIECES), mask=mask_here, other=0.0)
        sums = tl.dot(x, tl.trans(f.to(x.dtype)), sums)
        if IN_PASSING:
            outer = tl.dot(tl.trans(x), s)  # pyright: ignore[reportPossiblyUnboundVariable]
            outer_offsets = (block.to(tl.int64) * num_cols + cols[:, None]) * RANKS + tl.arange(0, RANKS)[None, :]
            tl.store(outer_ptr + outer_offsets, outer, mask=(cols < num_cols)[:, None])
    tl.store(sums_ptr + part.to(tl.int64) * num_tokens * sums_stride + offsets, sums, mask=mask)


@triton.jit
def _sum_parts_kernel(
    sums_ptr,
    out_ptr,
    num_parts,
    num_tokens,
    sums_stride,
    table_ptr,
    blocks_ptr,
    first_p,
    last_p,
    PROJECTIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """out = scale · Σ sums[g]"""
    block = tl.program_id(0) // (BLOCK_ROWS // ROWS)
    start, stop, adapter = _block(blocks_ptr, block)
    first, last = _rank_range(table_ptr, adapter, first_p, last_p, PROJECTIONS)
    ranks = first + tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    rows = start + tl.program_id(0) % (BLOCK_ROWS // ROWS) * ROWS + tl.arange(0, ROWS)
    mask = (rows < stop)[:, None] & (ranks < last)[None, :]
    offsets = rows[:, None] * sums_stride + ranks[None, :]
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for _ in range(num_parts):
        total += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        sums_ptr += num_tokens * sums_stride
    total = total * _scale(blocks_ptr, block)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate_kernel(
    x_ptr,
    x_stride,
    num_cols,
    s_ptr,
    s_stride,
    outer_ptr,
    table_ptr,
    blocks_ptr,
    first_p,
    last_p,
    PROJECTIONS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """outer[b] = xᵀ s of the block"""
    block = tl.program_id(1)
    start, stop, adapter = _block(blocks_ptr, block)
    first, last = _rank_range(table_ptr, adapter, first_p, last_p, PROJECTIONS)
    tile = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    ranks = first + tile
    if first + tl.program_id(0) * RANKS >= last:
        return
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    outer = tl.zeros([COLS, RANKS], tl.float32)
    for row in range(start, stop, ROWS):
        rows = row + tl.arange(0, ROWS)
        x_mask = (rows < stop)[:, None]
        s_mask = x_mask & (ranks < last)[None, :]
        if not EVEN:
            x_mask = x_mask & (cols < num_cols)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=x_mask, other=0.0)
        s = tl.load(s_ptr + rows[:, None] * s_stride + ranks[None, :], mask=s_mask, other=0.0)
        outer = tl.dot(tl.trans(x), s, outer)
    offsets = (block.to(tl.int64) * num_cols + cols[:, None]) * (RANKS * tl.num_programs(0)) + tile[None, :]
    tl.store(outer_ptr + offsets, outer, mask=(cols < num_cols)[:, None])


@triton.jit
def _add_sums_kernel(
    outer_ptr,
    num_cols,
    width,
    first_block_ptr,
    table_ptr,
    first_p,
    last_p,
    PROJECTIONS: tl.constexpr,
    SIDE: tl.constexpr,
    IN_PIECES: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """F.grad += Σ outer[b] over the adapter's blocks"""
    adapter = tl.program_id(0).to(tl.int64)
    first, _ = _rank_range(table_ptr, adapter, first_p, last_p, PROJECTIONS)
    tile = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    ranks = first + tile
    f_ptrs, strides, f_mask = _factors(table_ptr, adapter, ranks, first_p, last_p, SIDE, PROJECTIONS, IN_PIECES)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (cols < num_cols)[:, None]
    total = tl.zeros([COLS, RANKS], tl.float32)
    first_block, last_block = tl.load(first_block_ptr + adapter), tl.load(first_block_ptr + adapter + 1)
    outer_ptrs = outer_ptr + (first_block.to(tl.int64) * num_cols + cols[:, None]) * width + tile[None, :]
    for _ in range(first_block, last_block):
        total += tl.load(outer_ptrs, mask=mask, other=0.0)
        outer_ptrs += num_cols * width
    pointers = tl.trans(_elements(f_ptrs, strides, cols, SIDE, IN_PIECES))
    mask = mask & f_mask[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def _product_kernel(
    out_ptr,
    out_stride,
    x0_ptr,
    x0_stride,
    depth0,
    weight0_ptr,
    x1_ptr,
    x1_stride,
    depth1,
    weight1_ptr,
    x2_ptr,
    x2_stride,
    depth2,
    weight2_ptr,
    weight_stride,
    bias_ptr,
    s_ptr,
    s_stride,
    table_ptr,
    blocks_ptr,
    num_blocks,
    columns_ptr,
    num_columns,
    TERMS: tl.constexpr,
    BACKWARD: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PIECES: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of Σ x W + b + s F; of out + s F without terms. Neighbouring programs share rows, then columns."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns) * GROUP
    group_size = tl.minimum(num_blocks - group, GROUP)
    block = group + program % (GROUP * num_columns) % group_size
    column_ptr = columns_ptr + program % (GROUP * num_columns) // group_size * 5
    start, stop, adapter = _block(blocks_ptr, block)
    col, last_col, first_col = tl.load(column_ptr), tl.load(column_ptr + 1), tl.load(column_ptr + 4)
    first_p, last_p = tl.load(column_ptr + 2), tl.load(column_ptr + 3)

    # rows and columns beyond the tile's end start anew at its beginning: no masks in the loop, but for the store
    rows = start + tl.arange(0, ROWS) % (stop - start)
    cols = col + tl.arange(0, COLS) % (last_col - col)
    if EVEN_COLS:
        cols = tl.max_contiguous(tl.multiple_of(cols, 16), 16)
        col, last_col, first_col = tl.multiple_of(col, 16), tl.multiple_of(last_col, 16), tl.multiple_of(first_col, 16)
    out_ptrs = out_ptr + rows[:, None] * out_stride + cols[None, :]
    total = tl.load(out_ptrs).to(tl.float32) if TERMS == 0 else tl.zeros([ROWS, COLS], tl.float32)
    for term in tl.static_range(TERMS):  # pyright: ignore[reportGeneralTypeIssues]
        if term == 0:
            x_ptr, x_stride, depth, weight_ptr = x0_ptr, x0_stride, depth0, weight0_ptr
        elif term == 1:
            x_ptr, x_stride, depth, weight_ptr = x1_ptr, x1_stride, depth1, weight1_ptr
        else:
            x_ptr, x_stride, depth, weight_ptr = x2_ptr, x2_stride, depth2, weight2_ptr
        for k in range(0, depth, DEPTH):
            ks = k + tl.arange(0, DEPTH)
            x_ptrs = x_ptr + rows[:, None] * x_stride + ks[None, :]
            if BACKWARD:
                weight_ptrs = weight_ptr + ks.to(tl.int64)[:, None] * weight_stride + cols[None, :]
            else:
                weight_ptrs = weight_ptr + cols.to(tl.int64)[None, :] * weight_stride + ks[:, None]
            if EVEN_DEPTH:
                x = tl.load(x_ptrs)
                weight = tl.load(weight_ptrs)
            else:
                x = tl.load(x_ptrs, mask=(ks < depth)[None, :], other=0.0)
                weight = tl.load(weight_ptrs, mask=(ks < depth)[:, None], other=0.0)
            total = tl.dot(x, weight, total)

    first, last = _rank_range(table_ptr, adapter, first_p, last_p, PROJECTIONS)
    for rank in range(first, last, RANKS):
        ranks = rank + tl.arange(0, RANKS)
        f_ptrs, strides, f_mask = _factors(table_ptr, adapter, ranks, first_p, last_p, SIDE, PROJECTIONS, IN_PIECES)
        s = tl.load(s_ptr + rows[:, None] * s_stride + ranks[None, :], mask=(ranks < last)[None, :], other=0.0)
        f_ptrs = _elements(f_ptrs, strides, cols - first_col, SIDE, IN_PIECES)
        f = tl.load(f_ptrs, mask=f_mask[:, None], other=0.0)
        total = tl.dot(s, f.to(s.dtype), total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
    whole = (start + tl.arange(0, ROWS) < stop)[:, None] & (col + tl.arange(0, COLS) < last_col)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=whole)
