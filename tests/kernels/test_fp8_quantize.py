"""xorl_kernels.fp8_quantize: the kernels against the reference to the bit, the reference against the format.

O, I: outputs and inputs of a weight; R: rank of an adapter; U: bytes of a bucket.
"""

import math
import struct
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xorl_kernels.dispatch import use_triton
from xorl_kernels.fp8_quantize import (
    Lora,
    Packer,
    Piece,
    ToBfloat16,
    ToFloat32,
    ToFp8,
    dequantize,
    fp8_quantize,
    reference,
    scale_shape,
)

torch.set_num_threads(1)

FORMS = ["block", "channel", "tensor"]
DTYPES = [torch.bfloat16, torch.float32]
UNTOUCHED = 0xA5


def pack(pieces: Sequence[Piece], bucket_U: Tensor) -> list[bool]:
    """The kernels, whatever the device; returns which pieces were flagged."""
    from xorl_kernels.fp8_quantize import kernel

    return [flag != 0 for flag in kernel.pack(kernel.plan(pieces), bucket_U, len(pieces)).tolist()]


def empty_bucket(num_bytes: int, device: torch.device) -> Tensor:
    return torch.full((num_bytes,), UNTOUCHED, dtype=torch.uint8, device=device)


def weight(rows: int, cols: int, device: torch.device, dtype=torch.bfloat16, seed: int = 0, spread: float = 0.02):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, cols, generator=generator) * spread).to(dtype).to(device)


def lora(rows: int, cols: int, rank: int, scale: float, device: torch.device, dtype=torch.float32) -> Lora:
    a_RI, b_OR = weight(rank, cols, device, dtype, seed=1), weight(rows, rank, device, dtype, seed=2, spread=0.3)
    return Lora(a_RI, b_OR, scale)


def laid_out(
    weights: list[Tensor], form="block", power_of_two=False, *, loras=None, align=256, start=0
) -> tuple[list[ToFp8], int]:
    """FP8 pieces one after another, scales behind codes; and the bytes they take."""
    pieces, end = [], start
    for index, (weight_OI, lora) in enumerate(zip(weights, loras or [None] * len(weights), strict=True)):
        scale_offset = _up(end + weight_OI.numel(), max(align, 4))
        pieces.append(ToFp8(f"w{index}", weight_OI, end, scale_offset, form, power_of_two, lora))
        end = _up(scale_offset + 4 * math.prod(scale_shape(*weight_OI.shape, form)), align)
    return pieces, end


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def assert_packs_like_the_reference(pieces: Sequence[Piece], num_bytes: int, device: torch.device) -> None:
    actual_U, expected_U = empty_bucket(num_bytes, device), empty_bucket(num_bytes, device)
    flags = pack(pieces, actual_U)
    assert flags == reference.pack(pieces, expected_U).tolist()
    differing = (actual_U != expected_U).nonzero().flatten().tolist()
    assert not differing, f"{len(differing)} bytes differ, the first at {differing[0]}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_loses_half_a_code_at_most(form, dtype):
    weight_OI = weight(150, 200, torch.device("cpu"), dtype)
    codes_OI, scales = reference.quantize(weight_OI, form)
    assert (codes_OI.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scales.shape == scale_shape(150, 200, form)
    spread_OI = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:150, :200] if form == "block" else scales
    error_OI = (codes_OI.double() * spread_OI - weight_OI.double()).abs()
    half_a_code_OI = torch.maximum(weight_OI.double().abs() / 16, spread_OI.double() * 2**-10)
    assert (error_OI <= half_a_code_OI * (1 + 1e-5)).all()


def test_the_largest_weight_is_the_largest_code():
    codes_OI, scales = reference.quantize(weight(64, 64, torch.device("cpu"), spread=3.0))
    assert codes_OI.float().abs().max() == 448
    assert scales.shape == (1, 1)


def test_powers_of_two_round_up():
    amax = torch.tensor([448.0, 448.1, 1.0, 0.0, 3e38, float("inf"), float("nan")])
    scales = reference.scale_of(amax, power_of_two=True)
    exponents = torch.log2(scales[:5].double())
    assert (exponents == exponents.round()).all()
    assert scales[0] == 1
    assert scales[1] == 2
    plain = reference.scale_of(amax, power_of_two=False)
    assert ((scales >= plain) & (scales < 2 * plain))[:5].all()
    assert scales[5] == math.inf
    assert scales[6].isnan()


def test_casts_of_the_device_are_those_of_the_reference(device):
    """Every bfloat16 between ±448, the edges of codes included; a block's amax of 448 makes its scale exactly 1."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    finite = values[values.abs() <= 448]
    rows = finite.numel() // 128 + 1
    weight_OI = torch.zeros(rows * 128, dtype=torch.bfloat16)
    weight_OI[: finite.numel()] = finite
    weight_OI = weight_OI.view(rows, 128)
    weight_OI[::128, 0] = 448
    pieces, num_bytes = laid_out([weight_OI.to(device)])
    bucket_U = empty_bucket(num_bytes, device)
    pack(pieces, bucket_U)
    codes_OI = bucket_U[: weight_OI.numel()].view(torch.float8_e4m3fn).cpu().view(weight_OI.shape)
    assert (reference.quantize(weight_OI)[1] == 1).all()
    expected_OI = weight_OI.float().to(torch.float8_e4m3fn)
    assert torch.equal(codes_OI.view(torch.uint8), expected_OI.view(torch.uint8))


SIZES = st.sampled_from([1, 2, 3, 13, 16, 31, 64, 127, 128, 129, 144])
SHAPES = [(1, 1), (1, 300), (140, 1), (127, 131), (128, 128), (129, 257), (17, 48)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_bucket_of_many_shapes(device, form, dtype):
    weights = [weight(rows, cols, device, dtype, seed) for seed, (rows, cols) in enumerate(SHAPES)]
    assert_packs_like_the_reference(*laid_out(weights, form), device)


def test_one_launch_packs_all_weights_of_a_kind(device):
    from xorl_kernels.fp8_quantize import kernel

    weights = [weight(rows, cols, device) for rows, cols in ((16, 16), (1, 4096), (768, 2048), (5, 32))]
    pieces, _ = laid_out(weights)
    (launch,) = kernel.plan(pieces)
    assert launch.kind.aligned
    moved = [piece._replace(offset=piece.offset + 4) for piece in pieces]
    assert [launch.kind.aligned for launch in kernel.plan(moved)] == [False]


@pytest.mark.parametrize("form", FORMS)
def test_power_of_two_scales(device, form):
    weights = [weight(130, 144, device), weight(5, 7, device, spread=100.0)]
    assert_packs_like_the_reference(*laid_out(weights, form, power_of_two=True), device)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_the_shapes_and_contents(device, data):
    """Codes and scales are the reference's to the bit, whatever stands in a block, zeros included."""
    weights = []
    for seed in range(data.draw(st.integers(1, 2))):
        rows, cols = data.draw(st.tuples(SIZES, SIZES))
        dtype = data.draw(st.sampled_from(DTYPES))
        weight_OI = weight(rows, cols, device, dtype, seed, data.draw(st.sampled_from([0.0, 1e-30, 1e-5, 1.0, 1e30])))
        if data.draw(st.booleans()):
            weight_OI[: rows // 2 + 1] = 0
        weights.append(weight_OI)
    form, power_of_two = data.draw(st.sampled_from(FORMS)), data.draw(st.booleans())
    align = data.draw(st.sampled_from([1, 16, 256]))
    assert_packs_like_the_reference(*laid_out(weights, form, power_of_two, align=align), device)


@pytest.mark.parametrize("form", FORMS)
def test_zero_blocks_have_a_tiny_scale_and_codes_0(device, form):
    pieces, num_bytes = laid_out([torch.zeros(130, 144, dtype=torch.bfloat16, device=device)], form)
    bucket_U = empty_bucket(num_bytes, device)
    assert pack(pieces, bucket_U) == [False]
    assert not bucket_U[: 130 * 144].any()
    scale = bucket_U[pieces[0].scale_offset :][:4].view(torch.float32).item()
    assert 0 < scale < 1e-12


def test_what_lies_between_the_pieces_stays(device):
    weights = [weight(3, 5, device), weight(1, 16, device)]
    pieces = [ToFp8("a", weights[0], 7, 64), ToBfloat16("b", weights[1], 90)]
    bucket_U = empty_bucket(200, device)
    pack(pieces, bucket_U)
    written = torch.zeros(200, dtype=torch.bool)
    for start, stop in ((7, 22), (64, 68), (90, 122)):
        written[start:stop] = True
    assert (bucket_U.cpu()[~written] == UNTOUCHED).all()
    assert torch.equal(bucket_U[90:122].view(torch.bfloat16), weights[1][0])


@pytest.mark.parametrize("form", FORMS)
def test_any_strides_and_offsets(device, form):
    """A transposed weight, rows cut from wider ones, an address off by one element, an odd place in the bucket."""
    transposed = weight(96, 160, device).T
    cut = weight(64, 400, device)[:, 3:250]
    shifted = weight(1, 64 * 64 + 1, device)[0, 1:].view(64, 64)
    for start in (0, 1, 16):
        pieces, num_bytes = laid_out([transposed, cut, shifted], form, align=1, start=start)
        assert_packs_like_the_reference(pieces, num_bytes, device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FORMS)
def test_nonfinite_weights_are_flagged_and_never_repaired(device, form, value):
    weights = [weight(130, 144, device, seed=seed) for seed in range(3)]
    weights[1][129, 140] = value
    pieces, num_bytes = laid_out(weights, form)
    actual_U, expected_U = empty_bucket(num_bytes, device), empty_bucket(num_bytes, device)
    assert pack(pieces, actual_U) == [False, True, False] == reference.pack(pieces, expected_U).tolist()
    num_scales = math.prod(scale_shape(130, 144, form))
    start = pieces[1].scale_offset
    scales, expected = (x[start : start + 4 * num_scales].view(torch.float32) for x in (actual_U, expected_U))
    torch.testing.assert_close(scales, expected, rtol=0, atol=0, equal_nan=True)
    assert not scales[-1].isfinite()
    for piece in (pieces[0], pieces[2]):
        assert torch.equal(actual_U[piece.offset :][: 130 * 144], expected_U[piece.offset :][: 130 * 144])


LORAS = [(128, 256, 16, 2.0), (130, 144, 1, 0.5), (17, 31, 5, -1.0), (64, 64, 100, 0.25), (1, 1, 1, 4.0)]


@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weights_are_what_a_checkpoint_would_hold(device, dtype, lora_dtype):
    """Rounded once, to the weight's dtype, and sent in that or in the other."""
    pieces, end, exact = [], 0, []
    for rows, cols, rank, scale in LORAS:
        weight_OI, adapter = weight(rows, cols, device, dtype), lora(rows, cols, rank, scale, device, lora_dtype)
        a_RI, b_OR = (factor.to(dtype).double() for factor in (adapter.a_RI, adapter.b_OR))
        for kind in (ToBfloat16, ToFloat32):
            pieces.append(kind(f"{rows}x{cols}", weight_OI, end, adapter))
            end = _up(end + 4 * weight_OI.numel(), 256)
            exact.append(weight_OI.double() + scale * b_OR @ a_RI)
    actual_U, expected_U = empty_bucket(end, device), empty_bucket(end, device)
    assert not any(pack(pieces, actual_U))
    reference.pack(pieces, expected_U)
    for piece, exact_OI in zip(pieces, exact, strict=True):
        sent = torch.bfloat16 if isinstance(piece, ToBfloat16) else torch.float32
        half_a_code = 2**-8 if torch.bfloat16 in (dtype, sent) else 2**-19  # the sum's order, in float32
        for bucket_U in (actual_U, expected_U):
            num_bytes = sent.itemsize * exact_OI.numel()
            merged_OI = bucket_U[piece.offset :][:num_bytes].view(sent).view(exact_OI.shape)
            error_OI = (merged_OI.double() - exact_OI).abs()
            assert (error_OI <= exact_OI.abs() * half_a_code * 1.001 + 1e-6).all(), (piece.name, sent)


@pytest.mark.parametrize("form", FORMS)
def test_merge_and_quantise_is_quantising_the_merged_weight(device, form):
    """To the bit: rounding to bfloat16 lies between the two, as in a merged checkpoint."""
    weights = [weight(rows, cols, device) for rows, cols, _, _ in LORAS]
    loras = [lora(*sizes, device) for sizes in LORAS]
    pieces, num_bytes = laid_out(weights, form, loras=loras)
    fused_U = empty_bucket(num_bytes, device)
    pack(pieces, fused_U)
    for piece in pieces:
        codes_OI, scales = reference.quantize(merged_by_kernel(piece.weight_OI, piece.lora), form)
        assert torch.equal(fused_U[piece.offset :][: codes_OI.numel()], codes_OI.view(torch.uint8).flatten())
        fused_scales = fused_U[piece.scale_offset :][: 4 * scales.numel()].view(torch.float32)
        assert torch.equal(fused_scales, scales.flatten())


def merged_by_kernel(weight_OI: Tensor, adapter: Lora) -> Tensor:
    bucket_U = empty_bucket(2 * weight_OI.numel(), weight_OI.device)
    pack([ToBfloat16("merged", weight_OI, 0, adapter)], bucket_U)
    return bucket_U.view(torch.bfloat16).view(weight_OI.shape)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_zeros_changes_nothing(device, form):
    weight_OI = weight(130, 144, device)
    adapter = lora(130, 144, 8, 2.0, device)
    adapter.b_OR.zero_()
    (with_adapter,), num_bytes = laid_out([weight_OI], form, loras=[adapter])
    (without,), _ = laid_out([weight_OI], form)
    buckets = [empty_bucket(num_bytes, device) for _ in range(2)]
    pack([with_adapter], buckets[0])
    pack([without], buckets[1])
    assert torch.equal(*buckets)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_an_adapter_that_overflows_is_flagged(device):
    adapter = lora(16, 32, 4, 1.0, device)
    adapter.b_OR[3, 0] = 3e38
    adapter.a_RI[0, 5] = 1e9
    pieces = [
        ToBfloat16("merged", weight(16, 32, device), 0, adapter),
        ToFp8("codes", weight(16, 32, device), 1024, 1536),
    ]
    assert pack(pieces, empty_bucket(2048, device)) == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_pieces_are_copies(device, dtype):
    """Vectors as rows, odd sizes, transposed matrices: what a model has besides its linear layers."""
    weights = [weight(1, 37, device, dtype), weight(96, 160, device, dtype).T, weight(3, 5, device, dtype)]
    pieces, end = [], 0
    for kind in (ToFloat32, ToBfloat16):
        for index, weight_OI in enumerate(weights):
            pieces.append(kind(f"w{index}", weight_OI, end))
            end = _up(end + 4 * weight_OI.numel(), 4)
    assert_packs_like_the_reference(pieces, end, device)
    bucket_U = empty_bucket(end, device)
    pack(pieces, bucket_U)
    sent_OI = bucket_U[pieces[1].offset :][: 4 * weights[1].numel()].view(torch.float32).view(weights[1].shape)
    assert torch.equal(sent_OI, weights[1].float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(130, 200), (1, 300), (140, 1), (1, 1)])
def test_dequantised_codes_are_near_the_weight(form, shape):
    weight_OI = weight(*shape, torch.device("cpu"), torch.float32)
    codes_OI, scales = reference.quantize(weight_OI, form)
    largest = weight_OI.abs().max()
    assert ((dequantize(codes_OI, scales) - weight_OI).abs() <= weight_OI.abs() / 16 + largest * 2**-16).all()


def test_scales_that_do_not_fit_are_refused():
    codes_OI, _ = reference.quantize(weight(130, 200, torch.device("cpu")))
    with pytest.raises(ValueError, match=r"scales of shape \[2, 3\]"):
        dequantize(codes_OI, torch.ones(2, 3))


@pytest.mark.parametrize("form", FORMS)
def test_fp8_quantize_is_the_reference(device, form):
    weight_OI = weight(127, 131, device)
    codes_OI, scales = fp8_quantize(weight_OI, form)
    expected_OI, expected_scales = reference.quantize(weight_OI, form)
    assert torch.equal(codes_OI.view(torch.uint8), expected_OI.view(torch.uint8))
    assert torch.equal(scales, expected_scales)


def test_a_packer_writes_current_values_and_names_broken_ones(device):
    weights = {name: weight(40, 48, device) for name in ("layers.0", "layers.1")}
    packer = Packer([ToFp8(name, w, 4096 * i, 4096 * i + 2048) for i, (name, w) in enumerate(weights.items())])
    bucket_U = empty_bucket(packer.bucket_bytes, device)
    packer.write(bucket_U)
    assert packer.nonfinite() == []
    weights["layers.0"].mul_(-1)
    weights["layers.1"][3, 4] = math.nan
    packer.write(bucket_U)
    assert packer.nonfinite() == ["layers.1"]
    expected_OI, _ = reference.quantize(weights["layers.0"])
    assert torch.equal(bucket_U[: 40 * 48], expected_OI.view(torch.uint8).flatten())


def test_impossible_pieces_are_refused_by_name():
    weight_OI = weight(4, 4, torch.device("cpu"))
    adapter = lora(4, 5, 2, 1.0, torch.device("cpu"))
    wrong = [
        ToFp8("x", weight_OI, 0, 18),
        ToFp8("x", weight_OI, -1, 16),
        ToFp8("x", weight_OI[0], 0, 16),
        ToFp8("x", weight_OI[:0], 0, 16),
        ToFp8("x", weight_OI.half(), 0, 16),
        ToBfloat16("x", weight_OI, 3),
        ToFloat32("x", weight_OI, 2),
        ToBfloat16("x", weight_OI, 0, adapter),
    ]
    for piece in wrong:
        with pytest.raises(ValueError, match=r"^x: packing wants"):
            Packer([piece])
    with pytest.raises(ValueError, match="at least 32 bytes"):
        Packer([ToBfloat16("x", weight_OI, 0)]).write(torch.zeros(31, dtype=torch.uint8))


def test_triton_runs_on_cuda_only(device):
    assert use_triton(torch.zeros(1, device=device)) == (device.type == "cuda")


def test_the_interpreter_casts_like_pytorch(device):
    """What the fixture is for: without it these fail."""
    if device.type == "cuda":
        pytest.skip("compiled here")
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    for value, code in ((127.9, 128.0), (500.0, 448.0), (2**-10 * 3, 2**-8), (17.0, 16.0), (19.0, 20.0)):
        bits = interpreter._convert_float(np.array([value], np.float32), tl.float32, tl.float8e4nv, None)
        assert torch.from_numpy(bits).view(torch.float8_e4m3fn).item() == code
    rounded = interpreter._convert_float(np.array([1 + 3 * 2**-8], np.float32), tl.float32, tl.bfloat16, None)
    assert struct.unpack("<f", b"\0\0" + rounded.tobytes())[0] == 1 + 2**-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 128), (131, 257), (300, 144)])
def test_dequantised_in_triton_to_the_bit(rows, cols, dtype, device):
    kernel = pytest.importorskip("xorl_kernels.fp8_quantize.kernel")
    codes_OI, scales = fp8_quantize(weight(rows, cols, device))
    out_OI = torch.full((rows + 1, cols), 7.0, dtype=dtype, device=device)
    kernel.dequantize(codes_OI, scales, out_OI[:rows])
    assert torch.equal(out_OI[:rows], reference.dequantize(codes_OI, scales).to(dtype))
    assert (out_OI[rows:] == 7).all()
