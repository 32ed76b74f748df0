"""How much do log-probabilities cost without the logits in memory? `python -m bench.logprobs [--device cuda]`

M: tokens; H: hidden size; V: vocabulary. The head is frozen, as with LoRA, so that the floor of forward and backward
is two products: 4 M H V operations at the rate measured for one large product; 2 M H V for the forward alone.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Options, Result, compare, matmul_rate, options, report
from xorl_kernels.logprobs import function, logprobs, reference

Competitor = Callable[[Tensor], Tensor]  # the sum of the log-probabilities, from the hidden states


class Head(NamedTuple):
    model: str
    hidden_size: int
    vocab_size: int


CUDA_HEADS = (
    Head("Qwen3-8B", 4096, 151_936),
    Head("Qwen3-30B-A3B", 2048, 151_936),
    Head("Llama-3-70B", 8192, 128_256),
)
SMOLLM2_135M = Head("SmolLM2-135M", 576, 49_152)
EAGER_BYTES = 16  # a logit: in the head's dtype and in float32, and the gradients of both and of the softmax


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__ or "", arguments)
    on_cuda = chosen.device.type == "cuda"
    heads = CUDA_HEADS if on_cuda else (SMOLLM2_135M,)
    dtype = torch.bfloat16 if on_cuda else torch.float32
    tokens = [8] if chosen.small else [2048, 8192, 32_768] if on_cuda else [128, 512]
    rate = matmul_rate(chosen.device, dtype, size=8192 if on_cuda else 256 if chosen.small else 1024)
    results = [
        result
        for head in heads
        for m in tokens
        for ignored in (0.0, 0.5)
        for result in measure(head, m, ignored, dtype, rate, chosen)
    ]
    report(f"log-probabilities, {dtype}, {rate / 1e9:,.0f} GFLOP/s", results, chosen)


def measure(head: Head, tokens: int, ignored: float, dtype: torch.dtype, rate: float, chosen: Options) -> list[Result]:
    """All competitors on one size; the floor counts only tokens that have a target."""
    torch.manual_seed(0)
    torch.compiler.reset()  # each size is compiled for itself
    case = f"{head.model}, {tokens}, {ignored:.0%} ignored"
    hidden_MH = torch.randn(tokens, head.hidden_size, device=chosen.device).to(dtype).requires_grad_()
    weight_VH = (torch.randn(head.vocab_size, head.hidden_size, device=chosen.device) / head.hidden_size**0.5).to(dtype)
    targets_M = torch.randint(head.vocab_size, (tokens,), device=chosen.device)
    targets_M[: int(ignored * tokens)] = -100

    sample = slice(None, None, max(tokens // 256, 1))
    few_MH = hidden_MH.detach()[sample].requires_grad_()
    expected = dict(_competitors(few_MH, weight_VH, targets_M[sample], chosen))
    for name, run in expected.items():
        _check(name, run, expected["torch eager"], few_MH)

    runs = {}
    for name, run in _competitors(hidden_MH, weight_VH, targets_M, chosen):
        if name in ("torch eager", "torch.compile") and not _fits(tokens * head.vocab_size, chosen):
            print(f"{case}: {name} is left out, its logits do not fit")
            continue
        runs |= {f"{name}, forward": _forward(run, hidden_MH), f"{name}, with backward": _backward(run, hidden_MH)}
    product_s = 2 * (targets_M != -100).sum().item() * head.hidden_size * head.vocab_size / rate
    floors_s = {name: 2 * product_s if "backward" in name else product_s for name in runs}
    return compare(case, runs, floors_s, chosen)


def _competitors(
    hidden_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, chosen: Options
) -> Iterator[tuple[str, Competitor]]:
    """Ours, PyTorch's ways, and the libraries that are installed."""

    def eager(hidden_MH: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden_MH, weight_VH).float(), targets_M, reduction="sum")

    def chunked(hidden_MH: Tensor) -> Tensor:
        ask = function.Ask(reference)
        return function.scores(hidden_MH, weight_VH, targets_M[:, None], None, ask).logprobs_TK.sum()

    yield "xorl", lambda hidden_MH: logprobs(hidden_MH, weight_VH, targets_M[:, None]).sum()
    yield "torch eager", eager
    if hidden_MH.is_cuda:  # elsewhere it is ours
        yield "torch chunked", chunked
    if not chosen.small:
        yield "torch.compile", torch.compile(eager, dynamic=False)
    if find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        yield (
            "liger",
            lambda hidden_MH: (
                -_first(liger_fused_linear_cross_entropy(hidden_MH, weight_VH, targets_M, reduction="sum"))
            ),
        )
    if find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        yield (
            "cut-cross-entropy",
            lambda hidden_MH: -linear_cross_entropy(hidden_MH, weight_VH, targets_M, reduction="sum", impl="cce_exact"),
        )


def _first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _fits(num_logits: int, chosen: Options) -> bool:
    return chosen.device.type != "cuda" or EAGER_BYTES * num_logits < torch.cuda.mem_get_info(chosen.device)[0]


def _forward(run: Competitor, hidden_MH: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.no_grad()(run)(hidden_MH)


def _backward(run: Competitor, hidden_MH: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(run(hidden_MH), hidden_MH)[0]


def _check(name: str, run: Competitor, expected: Competitor, hidden_MH: Tensor) -> None:
    """A wrong answer is not worth timing."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[hidden_MH.dtype]
    for made in (_forward, _backward):
        actual, wanted = made(run, hidden_MH)().float(), made(expected, hidden_MH)().float()
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


if __name__ == "__main__":
    main()
