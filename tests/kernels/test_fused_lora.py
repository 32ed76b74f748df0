"""xorl_kernels.fused_lora: the formula in float64, one token at a time, against every way of computing it.

T: tokens; I, O: inputs and outputs; P: projections; R: an adapter's rank.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from xorl_kernels import tuning
from xorl_kernels.fp8_quantize import dequantize, fp8_quantize
from xorl_kernels.fused_lora import Base, Pair, Segment, fused_lora, reference, with_steps
from xorl_kernels.fused_lora.layout import Layout

torch.set_num_threads(1)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
WAYS = ("reference", "cuBLAS and tail", "tiles 128x256", "tiles 128x128", "tiles 64x128")


class Case(NamedTuple):
    """Shapes, and of each segment start, stop, ranks by projection and scale."""

    num_tokens: int
    inputs: int
    sizes: tuple[int, ...]
    segments: tuple[tuple[int, int, tuple[int, ...], float], ...]


CASES = {
    "no adapter": Case(37, 20, (28,), ()),
    "one for all": Case(37, 20, (28,), ((0, 37, (4,), 2.0),)),
    "one token, rank 1": Case(1, 7, (5,), ((0, 1, (1,), 0.5),)),
    "many, of many ranks": Case(
        150, 20, (28,), ((0, 5, (8,), 1.0), (5, 6, (1,), 2.0), (6, 20, (16,), 0.25), (20, 150, (37,), -1.0))
    ),
    "gaps": Case(37, 20, (28,), ((3, 9, (4,), 1.0), (12, 13, (2,), 3.0), (30, 35, (4,), 1.0))),
    "an empty segment": Case(37, 20, (28,), ((0, 10, (4,), 1.0), (10, 10, (2,), 1.0), (10, 37, (4,), 1.0))),
    "rank above the width": Case(37, 20, (28,), ((4, 30, (72,), 1.0),)),
    "scale 0": Case(37, 20, (28,), ((4, 30, (4,), 0.0),)),
    "q, k and v": Case(270, 64, (144, 48, 48), ((0, 131, (16, 16, 16), 2.0), (131, 260, (8, 0, 3), 0.5))),
    "gate and up of one adapter alone": Case(40, 32, (80, 80), ((0, 20, (0, 8), 1.0), (20, 40, (8, 8), 1.0))),
    "no pair at all": Case(20, 32, (16, 16), ((0, 20, (0, 0), 1.0),)),
}


class Problem(NamedTuple):
    x_TI: Tensor
    base: Base
    segments: tuple[Segment, ...]

    @property
    def factors(self) -> list[Tensor]:
        return [factor for segment in self.segments for pair in segment.pairs if pair for factor in pair]


def problem(case: Case, dtype: torch.dtype, device: torch.device, *, bias: bool = True) -> Problem:
    generator = torch.Generator().manual_seed(sum(case.sizes) + len(case.segments))

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=generator) / 4
        return values.to(dtype).to(device).requires_grad_()

    base = Base(
        random(sum(case.sizes), case.inputs, dtype=dtype),
        random(sum(case.sizes), dtype=dtype) if bias else None,
        case.sizes,
    )
    segments = tuple(
        Segment(
            start,
            stop,
            tuple(
                Pair(random(rank, case.inputs), random(size, rank)) if rank else None
                for rank, size in zip(ranks, case.sizes, strict=True)
            ),
            scale,
        )
        for start, stop, ranks, scale in case.segments
    )
    return Problem(random(case.num_tokens, case.inputs, dtype=dtype), base, segments)


def in_float64(p: Problem) -> Problem:
    def double(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    bias_O = None if p.base.bias_O is None else double(p.base.bias_O)
    segments = tuple(s._replace(pairs=tuple(pair and Pair(*map(double, pair)) for pair in s.pairs)) for s in p.segments)
    return Problem(double(p.x_TI), Base(double(p.base.weight_OI), bias_O, p.base.sizes), segments)


def formula(x_TI: Tensor, base: Base, segments: tuple[Segment, ...]) -> tuple[Tensor, ...]:
    rows = []
    for token, x_I in enumerate(x_TI):
        parts = list((base.weight_OI @ x_I + (0 if base.bias_O is None else base.bias_O)).split(base.sizes))
        for segment in (s for s in segments if s.start <= token < s.stop):
            for p, pair in enumerate(segment.pairs):
                if pair is not None:
                    parts[p] = parts[p] + segment.scale * (pair.b_OR @ (pair.a_RI @ x_I))
        rows.append(torch.cat(parts))
    return torch.stack(rows).split(base.sizes, dim=1)


def run(function: Callable, p: Problem) -> list[Tensor]:
    """Outputs, then the gradients of x, W, b and every A and B."""
    ys = function(p.x_TI, p.base, p.segments)
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device) for y in ys]
    torch.autograd.backward(ys, dys)
    leaves = [p.x_TI, p.base.weight_OI, *([] if p.base.bias_O is None else [p.base.bias_O]), *p.factors]
    return [*ys, *(torch.zeros(leaf.shape) if leaf.grad is None else leaf.grad for leaf in leaves)]


def compute(way: str) -> Callable:
    return partial(with_steps, steps(way))


def steps(way: str) -> ModuleType | SimpleNamespace:
    if way == "reference":
        return reference
    kernel = pytest.importorskip("xorl_kernels.fused_lora.kernel")
    routes = [tile for tile in kernel.TILES if way == f"tiles {tile.rows}x{tile.cols}"] or [None]
    steered = {name: partial(getattr(kernel, name), routes=routes) for name in ("linear", "input_gradient")}
    return SimpleNamespace(**{**vars(kernel), **steered})


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative to the largest entry: in bfloat16 every sum of products loses the last bits of its terms."""
    for ours, theirs in zip(actual, expected, strict=True):
        largest = theirs.abs().amax().clamp(min=1) if theirs.numel() else 1.0
        close = dict(rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.double().cpu() / largest, theirs.double().cpu() / largest, **close)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case, dtype, way, device):
    if dtype == torch.float32 and way != "reference" and device.type == "cuda":
        pytest.skip("float32 is the reference's on CUDA")
    p = problem(case, dtype, device, bias=case.num_tokens % 2 == 0)
    expected = run(formula, in_float64(p))
    actual = run(compute(way), p)
    assert {y.dtype for y in actual[: len(case.sizes)]} == {dtype}
    assert {factor.grad.dtype for factor in p.factors if factor.grad is not None} <= {torch.float32}
    assert_close(actual, expected, TOLERANCE[dtype])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    primes_and_more = st.sampled_from([1, 2, 13, 16, 64, 67, 128, 131, 144])
    sizes = tuple(draw(st.lists(primes_and_more, min_size=1, max_size=3)))
    num_tokens = draw(st.sampled_from([1, 3, 64, 65, 127, 300]))
    cuts = sorted(draw(st.lists(st.integers(0, num_tokens), min_size=2, max_size=6)))
    segments = []
    for start, stop in pairwise(cuts):
        ranks = tuple(draw(st.sampled_from([0, 1, 3, 8, 16, 48, 80])) for _ in sizes)
        segments.append((start, stop, ranks, draw(st.sampled_from([0.5, 1.0, -2.0]))))
    return Case(num_tokens, draw(primes_and_more), sizes, tuple(segments))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), way=st.sampled_from(WAYS[1:]))
def test_kernels_agree_with_the_reference(case, way, device):
    p, q = (problem(case, torch.bfloat16, device) for _ in range(2))
    assert_close(run(compute(way), p), run(compute("reference"), q), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_give_the_same_bits(way, device):
    first, second = (run(compute(way), problem(CASES["q, k and v"], torch.bfloat16, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("case", ["q, k and v", "many, of many ranks", "no adapter"])
def test_an_fp8_base_is_the_one_that_its_codes_stand_for(case, way, device):
    p, q = (problem(CASES[case], torch.bfloat16, device) for _ in range(2))
    sizes = CASES[case].sizes
    quantized = [fp8_quantize(weight_QI) for weight_QI in p.base.weight_OI.detach().split(sizes)]
    codes_OI = torch.cat([codes_QI.view(torch.uint8) for codes_QI, _ in quantized]).view(torch.float8_e4m3fn)
    held = p.base._replace(weight_OI=codes_OI, scales=tuple(scales for _, scales in quantized))
    plain_OI = torch.cat([dequantize(*each) for each in quantized]).to(torch.bfloat16)
    meant = q.base._replace(weight_OI=plain_OI)
    got, wanted = run(compute(way), p._replace(base=held)), run(compute(way), q._replace(base=meant))
    for actual, expected in zip(got, wanted, strict=True):
        assert torch.equal(actual.float(), expected.float())


@pytest.mark.parametrize("way", WAYS[:2])
def test_gradients_are_added_in_place(way, device):
    p, q = (problem(CASES["q, k and v"], torch.bfloat16, device) for _ in range(2))
    run(compute(way), p)
    before = [factor.grad.clone() for factor in p.factors]
    places = [factor.grad.data_ptr() for factor in p.factors]
    run(compute(way), p)
    run(compute(way), q)
    assert [factor.grad.data_ptr() for factor in p.factors] == places
    for twice, once, alone in zip(p.factors, before, q.factors, strict=True):
        torch.testing.assert_close(twice.grad, 2 * once)
        assert torch.equal(once, alone.grad)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_in_its_segment(way, device):
    p = problem(CASES["q, k and v"], torch.bfloat16, device)
    with torch.no_grad():
        p.x_TI[140] = torch.nan
        p.x_TI[150] = torch.inf
    run(compute(way), p)
    first, second = p.segments
    assert all(factor.grad.isfinite().all() for pair in first.pairs for factor in pair)
    assert all(pair.a_RI.grad.isnan().any() for pair in second.pairs if pair)
    assert p.x_TI.grad[:131].isfinite().all()


@pytest.mark.parametrize("way", WAYS[:2])
def test_only_what_is_trained_gets_a_gradient(way, device):
    p = problem(CASES["q, k and v"], torch.bfloat16, device)
    frozen, trained = (segment.pairs[0] for segment in p.segments)
    for tensor in (p.x_TI, p.base.weight_OI, p.base.bias_O, *frozen):
        tensor.requires_grad_(False)
    run(compute(way), p)
    assert [tensor.grad for tensor in (p.x_TI, p.base.weight_OI, p.base.bias_O, *frozen)] == [None] * 5
    assert trained.a_RI.grad.any()
    assert trained.b_OR.grad.any()


@pytest.mark.parametrize("way", WAYS)
def test_b_zero_is_the_base_layer(way, device):
    p = problem(CASES["one for all"], torch.bfloat16, device)
    with torch.no_grad():
        for segment in p.segments:
            segment.pairs[0].b_OR.zero_()
    (adapted_TO,) = compute(way)(p.x_TI, p.base, p.segments)
    (base_TO,) = compute(way)(p.x_TI, p.base, ())
    assert torch.equal(adapted_TO, base_TO)


def test_a_segment_does_not_see_its_neighbours():
    p = problem(CASES["many, of many ranks"], torch.float32, torch.device("cpu"))
    (together_TO,) = fused_lora(*p)
    for segment in p.segments:
        tokens = slice(segment.start, segment.stop)
        moved = segment._replace(start=0, stop=segment.stop - segment.start)
        (alone_TO,) = fused_lora(p.x_TI[tokens], p.base, [moved])
        torch.testing.assert_close(together_TO[tokens], alone_TO, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS[:2])
def test_one_adapter_in_two_segments_adds_its_gradients(way, device):
    whole = problem(Case(300, 20, (28,), ((0, 300, (4,), 1.0),)), torch.bfloat16, device)
    split = problem(Case(300, 20, (28,), ((0, 300, (4,), 1.0),)), torch.bfloat16, device)
    (segment,) = split.segments
    halves = (segment._replace(stop=110), segment._replace(start=110))
    run(compute(way), whole)
    run(compute(way), split._replace(segments=halves))
    for a, b in zip(whole.factors, split.factors, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_strides_are_free(way, device):
    case = CASES["gaps"]
    p, q = (problem(case, torch.bfloat16, device) for _ in range(2))
    strided = Problem(
        *(
            _strided(q.x_TI),
            q.base._replace(weight_OI=_strided(q.base.weight_OI)),
            tuple(s._replace(pairs=tuple(Pair(*map(_strided, pair)) for pair in s.pairs)) for s in q.segments),
        )
    )
    assert_close(run(compute(way), strided), run(compute(way), p), 1e-2)


def _strided(x: Tensor) -> Tensor:
    return x.detach().T.contiguous().T.requires_grad_()


def test_overlapping_segments_are_refused():
    with pytest.raises(ValueError, match=r"segment 5\.\.9 overlaps"):
        Layout([Segment(0, 6, (None,), 1.0), Segment(5, 9, (None,), 1.0)], [4], 9)
    with pytest.raises(ValueError, match="leaves the 9 tokens"):
        Layout([Segment(0, 10, (None,), 1.0)], [4], 9)


def test_ranks_begin_where_wide_loads_may():
    pairs = tuple(Pair(torch.zeros(rank, 4), torch.zeros(4, rank)) for rank in (3, 8, 1))
    layout = Layout([Segment(0, 9, pairs, 1.0)], [4, 4, 4], 9)
    assert layout.columns == [(slice(0, 3), slice(8, 16), slice(16, 17))]
    assert layout.num_ranks == 24


def test_the_fastest_is_measured_once_and_remembered(monkeypatch, tmp_path):
    file = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv("XORL_TUNING", str(file))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    measured = []
    monkeypatch.setattr(tuning, "_measure", lambda candidates: measured.append(1) or "b")
    candidates = {"a": lambda: None, "b": lambda: None}
    for _ in range(2):
        tuning._answers.cache_clear()  # as a new process would
        for _ in range(2):
            assert tuning.fastest("question", candidates, torch.device("cuda")) == "b"
    assert len(measured) == 1
    file.write_text("{not JSON")
    tuning._answers.cache_clear()
    assert tuning.fastest("question", candidates, torch.device("cuda")) == "b"
    tuning._answers.cache_clear()
