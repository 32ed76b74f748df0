"""What do adapters cost on top of the base model's linear layers? `python -m bench.fused_lora [--device cuda]`

T: tokens; I, O: inputs and outputs of projections side by side; R: ranks. Times are of forward and backward (dx, dA,
dB; the base is frozen), and the floor is the base alone: one product forward, one for dx.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Options, Result, compare, matmul_rate, options, report
from xorl_kernels.fp8_quantize import dequantize, fp8_quantize
from xorl_kernels.fused_lora import Base, Pair, Segment, fused_lora

BASE = "base alone"
MIXED_RANKS = (16, 64, 8, 32, 16, 128, 8, 256)  # of many adapters, in turn
COMPILED_TOKENS = (512, 8192)  # compiling takes seconds a shape
SCALE = 2.0


class Projections(NamedTuple):
    """Linear layers of one input."""

    name: str
    num_inputs: int
    sizes: tuple[int, ...]  # outputs of each


class Case(NamedTuple):
    model: str
    projections: tuple[Projections, ...]  # run one after the other
    num_tokens: int
    ranks: tuple[int, ...] = (16,)  # of each adapter


class Problem(NamedTuple):
    """One call: its tensors, and gradients to send back, in one piece and in one a projection."""

    x_TI: Tensor
    base: Base
    in_fp8: Base  # the same weights
    segments: tuple[Segment, ...]
    dy_TO: Tensor
    dys: tuple[Tensor, ...]


Forward = Callable[[Problem], Sequence[Tensor]]

QWEN3_8B = (
    Projections("qkv", 4096, (4096, 1024, 1024)),
    Projections("o", 4096, (4096,)),
    Projections("gate,up", 4096, (12288, 12288)),
    Projections("down", 12288, (4096,)),
)
QWEN3_30B_ATTENTION = (Projections("qkv", 2048, (4096, 512, 512)), Projections("o", 4096, (2048,)))
QWEN3_30B_EXPERT = (Projections("gate,up", 2048, (768, 768)), Projections("down", 768, (2048,)))
LLAMA3_70B = (
    Projections("qkv", 8192, (8192, 1024, 1024)),
    Projections("gate,up", 8192, (28672, 28672)),
    Projections("down", 28672, (8192,)),
)
TINY = (Projections("qkv", 64, (64, 32, 32)), Projections("down", 96, (64,)))
SMOLLM2_135M = (
    Projections("qkv", 576, (576, 192, 192)),
    Projections("o", 576, (576,)),
    Projections("gate,up", 576, (1536, 1536)),
    Projections("down", 1536, (576,)),
)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__ or "", arguments)
    on_cuda = chosen.device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    cases = cuda_cases() if on_cuda else cpu_cases(chosen.small)
    results = [result for case in cases for result in measure(case, dtype, chosen)]
    report(f"linear layers with LoRA, forward and backward, {dtype}", results, chosen)


def cuda_cases() -> Iterator[Case]:
    """What training sees, in a few minutes: each projection of one model, whole layers, and what differs elsewhere."""
    for num_tokens in (2048, 8192):
        for projections in QWEN3_8B:
            yield Case("Qwen3-8B", (projections,), num_tokens)
    for num_tokens in (512, 2048, 8192, 32768):
        yield Case("Qwen3-8B", QWEN3_8B, num_tokens)
    for rank in (64, 128):
        yield Case("Qwen3-8B", QWEN3_8B[:1], 8192, (rank,))
    for num_adapters in (4, 16):
        yield Case("Qwen3-8B", QWEN3_8B, 8192, mixed_ranks(num_adapters))
    for projections in QWEN3_30B_ATTENTION:
        yield Case("Qwen3-30B-A3B", (projections,), 8192)
    for num_tokens in (512, 2048):
        yield Case("Qwen3-30B-A3B expert", QWEN3_30B_EXPERT, num_tokens)
    for projections in LLAMA3_70B:
        yield Case("Llama-3-70B", (projections,), 8192)


def cpu_cases(small: bool) -> Iterator[Case]:
    model, projections, num_tokens = ("tiny", TINY, 16) if small else ("SmolLM2-135M", SMOLLM2_135M, 512)
    yield Case(model, projections[:1], num_tokens)
    for num_adapters in (1, 4):
        yield Case(model, projections, num_tokens, mixed_ranks(num_adapters))


def mixed_ranks(num_adapters: int) -> tuple[int, ...]:
    return tuple(MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(num_adapters))


def measure(case: Case, dtype: torch.dtype, chosen: Options) -> list[Result]:
    """The base alone, ours and the peers on one case; each answers right before it is timed."""
    torch.manual_seed(0)
    problems = [make_problem(projections, case, dtype, chosen.device) for projections in case.projections]
    forwards: dict[str, Forward] = {"xorl": ours, "xorl, FP8 base": ours_in_fp8, "addmm_": addmm, "torch eager": eager}
    if len(case.ranks) == 1 and find_spec("peft") is not None:
        forwards["PEFT"] = peft_forward(problems)
    if not chosen.small and case.num_tokens in COMPILED_TOKENS and case.ranks == (16,):
        torch.compiler.reset()
        forwards["torch.compile"] = torch.compile(eager, dynamic=False)
    for problem in problems:
        check(forwards, problem)
    competitors = {name: partial(steps, forward, problems) for name, forward in ({BASE: base_alone} | forwards).items()}
    rate = matmul_rate(chosen.device, dtype, 8192 if chosen.device.type == "cuda" else 256)
    tera_flop = sum(4 * case.num_tokens * problem.base.weight_OI.numel() for problem in problems) / 1e12
    ceiling = f"{BASE}: {tera_flop:,.3g} TFLOP, where a square product does {rate / 1e12:,.3g} TFLOP/s"
    return compare(words(case), competitors, BASE, chosen, ceiling, partial(clear_gradients, problems))


def words(case: Case) -> str:
    parts = "layer" if len(case.projections) > 1 else "".join(each.name for each in case.projections)
    ranks = f"{len(case.ranks)} adapters" if len(case.ranks) > 1 else f"r {max(case.ranks)}"
    return f"{case.model} {parts}, T {case.num_tokens}, {ranks}"


def make_problem(projections: Projections, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def pair(rank: int, size: int) -> Pair:
        a_RI, b_OR = random(rank, num_inputs) / num_inputs**0.5, random(size, rank) / rank**0.5
        return Pair(a_RI.requires_grad_(), b_OR.requires_grad_())

    num_inputs, sizes = projections.num_inputs, projections.sizes
    codes, scales = zip(*(fp8_quantize(random(size, num_inputs) / num_inputs**0.5) for size in sizes), strict=True)
    weight_OI = torch.cat([dequantize(*each) for each in zip(codes, scales, strict=True)]).to(dtype)
    codes_OI = torch.cat([codes_QI.view(torch.uint8) for codes_QI in codes]).view(torch.float8_e4m3fn)
    segments = tuple(
        Segment(start, stop, tuple(pair(rank, size) for size in sizes), SCALE)
        for (start, stop), rank in zip(skewed(case.num_tokens, len(case.ranks)), case.ranks, strict=True)
    )
    x_TI = random(case.num_tokens, num_inputs).to(dtype).requires_grad_()
    dy_TO = random(case.num_tokens, sum(sizes)).to(dtype)
    dys = tuple(dy_TQ.contiguous() for dy_TQ in dy_TO.split(sizes, dim=1))
    return Problem(x_TI, Base(weight_OI, None, sizes), Base(codes_OI, None, sizes, scales), segments, dy_TO, dys)


def skewed(num_tokens: int, num_parts: int) -> Iterator[tuple[int, int]]:
    """Where parts start and stop, the n-th in proportion to 1 / n."""
    shares = list(accumulate(1 / (n + 1) for n in range(num_parts)))
    return pairwise([0, *(round(num_tokens * share / shares[-1]) for share in shares)])


def steps(forward: Forward, problems: Sequence[Problem]) -> None:
    for problem in problems:
        step(forward, problem)


def step(forward: Forward, problem: Problem) -> Sequence[Tensor]:
    """Forward and backward. Who returns all projections in one piece is given their gradients in one piece."""
    outputs = forward(problem)
    torch.autograd.backward(outputs, problem.dys if len(outputs) > 1 else (problem.dy_TO,))
    return outputs


def clear_gradients(problems: Sequence[Problem]) -> None:
    for problem in problems:
        for tensor in (problem.x_TI, *factors(problem)):
            tensor.grad = None


def factors(problem: Problem) -> list[Tensor]:
    return [factor for _, _, pairs, _ in problem.segments for pair in pairs if pair is not None for factor in pair]


def check(forwards: Mapping[str, Forward], problem: Problem) -> None:
    """A wrong answer is not worth timing: all against eager in float64, on CUDA in float32 for the size's sake."""
    on_cuda = problem.x_TI.is_cuda
    exact = cast(problem, torch.float32 if on_cuda else torch.float64)
    tolerance = 2e-2 if on_cuda else 1e-4
    expected = answer(eager, exact)
    for name, forward in forwards.items():
        # PEFT has factors of its own
        compared = list(zip(answer(forward, problem), expected, strict=name != "PEFT"))
        for got, wanted in compared:
            off = (got - wanted).norm() / wanted.norm()
            assert off < tolerance, f"{name} is off by {off.item():.1e} in a tensor of {tuple(wanted.shape)}"
    clear_gradients([problem])


def answer(forward: Forward, problem: Problem) -> list[Tensor]:
    """y, dx and the gradients of the factors that have one."""
    clear_gradients([problem])
    y_TO = torch.cat([y.detach() for y in step(forward, problem)], dim=1)
    return [y_TO, *(tensor.grad for tensor in (problem.x_TI, *factors(problem)) if tensor.grad is not None)]


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    x_TI, base, in_fp8, segments, dy_TO, dys = problem
    return Problem(
        leaf(x_TI),
        base._replace(weight_OI=base.weight_OI.to(dtype)),
        in_fp8,
        tuple(
            Segment(start, stop, tuple(pair and Pair(*map(leaf, pair)) for pair in pairs), scale)
            for start, stop, pairs, scale in segments
        ),
        dy_TO.to(dtype),
        tuple(dy_TQ.to(dtype) for dy_TQ in dys),
    )


def base_alone(problem: Problem) -> Sequence[Tensor]:
    return (F.linear(problem.x_TI, problem.base.weight_OI),)


def ours(problem: Problem) -> Sequence[Tensor]:
    return fused_lora(problem.x_TI, problem.base, problem.segments)


def ours_in_fp8(problem: Problem) -> Sequence[Tensor]:
    return fused_lora(problem.x_TI, problem.in_fp8, problem.segments)


def eager(problem: Problem) -> Sequence[Tensor]:
    """As one would write it; with many adapters, a loop over their tokens."""
    x_TI, (weight_OI, _, sizes, _), _, segments, *_ = problem
    outputs = []
    for p, weight_QI in enumerate(weight_OI.split(sizes)):
        deltas = [
            scale * F.linear(F.linear(x_TI[start:stop], pair.a_RI.to(x_TI.dtype)), pair.b_OR.to(x_TI.dtype))
            for start, stop, pairs, scale in segments
            if (pair := pairs[p]) is not None
        ]
        outputs.append(F.linear(x_TI, weight_QI) + (deltas[0] if len(deltas) == 1 else torch.cat(deltas)))
    return outputs


def addmm(problem: Problem) -> Sequence[Tensor]:
    """Unsloth's way, on stacked projections: each adapter's product is added to the base's output in place."""
    return (_Addmm.apply(problem.x_TI, problem, *factors(problem)),)


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, problem: Problem, *factors: Tensor) -> Tensor:
        y_TO = F.linear(x_TI, problem.base.weight_OI)
        products = []
        for tokens, outputs, a_RI, b_OR, scale in _parts(problem):
            products.append(F.linear(x_TI[tokens], a_RI) * scale)
            y_TO[tokens, outputs].addmm_(products[-1], b_OR.T)
        ctx.save_for_backward(x_TI, *products)
        ctx.problem = problem
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, *products = ctx.saved_tensors
        dx_TI = dy_TO @ ctx.problem.base.weight_OI
        gradients = []
        for (tokens, outputs, a_RI, b_OR, scale), s_TR in zip(_parts(ctx.problem), products, strict=True):
            dy_TQ = dy_TO[tokens, outputs]
            ds_TR = dy_TQ @ b_OR * scale
            dx_TI[tokens].addmm_(ds_TR, a_RI)
            gradients += [(ds_TR.T @ x_TI[tokens]).float(), (dy_TQ.T @ s_TR).float()]
        return dx_TI, None, *gradients


def _parts(problem: Problem) -> Iterator[tuple[slice, slice, Tensor, Tensor, float]]:
    """Of each pair: its tokens, its outputs, and the pair in the dtype of the products."""
    dtype = problem.x_TI.dtype
    ends = list(pairwise([0, *accumulate(problem.base.sizes)]))
    for start, stop, pairs, scale in problem.segments:
        for pair, outputs in zip(pairs, ends, strict=True):
            if pair is not None:
                yield slice(start, stop), slice(*outputs), pair.a_RI.to(dtype), pair.b_OR.to(dtype), scale


def peft_forward(problems: Sequence[Problem]) -> Forward:
    """PEFT's own layers, their factors in the dtype of the products."""
    layers = {id(problem.base.weight_OI): _peft_layers(problem) for problem in problems}

    def forward(problem: Problem) -> Sequence[Tensor]:
        its_layers = layers[id(problem.base.weight_OI)]
        its_layers.zero_grad()
        return [layer(problem.x_TI) for layer in its_layers.values()]

    return forward


def _peft_layers(problem: Problem) -> torch.nn.ModuleDict:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    x_TI, (weight_OI, _, sizes, _), _, (segment,), *_ = problem
    linears = torch.nn.ModuleDict()
    for p, weight_QI in enumerate(weight_OI.split(sizes)):
        num_outputs, num_inputs = weight_QI.shape
        linears[f"p{p}"] = linear = torch.nn.Linear(num_inputs, num_outputs, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight_QI, requires_grad=False)
    rank = next(len(pair.a_RI) for pair in segment.pairs if pair is not None)
    config = LoraConfig(r=rank, lora_alpha=int(segment.scale * rank), target_modules=list(linears))
    inject_adapter_in_model(config, linears)
    for layer, pair in zip(linears.values(), segment.pairs, strict=True):
        assert isinstance(layer, LoraLayer)
        assert pair is not None
        for factors, factor in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            factors["default"].weight.data = factor.to(x_TI.dtype)
    return linears


if __name__ == "__main__":
    main()
