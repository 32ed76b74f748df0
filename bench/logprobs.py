"""How much do log-probabilities cost without the logits in memory? `python -m bench.logprobs [--device cuda]`

M: tokens; H: hidden size; V: vocabulary. The head is frozen, as with LoRA, so that the floor of forward and backward
is two products: 4 M H V operations at the rate measured for one large product; 2 M H V for the forward alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Options, Result, compare, matmul_rate, options, report
from xorl_kernels.logprobs import logprobs


class Head(NamedTuple):
    model: str
    hidden_size: int
    vocab_size: int


QWEN3_8B = Head("Qwen3-8B", 4096, 151_936)
SMOLLM2_135M = Head("SmolLM2-135M", 576, 49_152)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__ or "", arguments)
    on_cuda = chosen.device.type == "cuda"
    head = QWEN3_8B if on_cuda else SMOLLM2_135M
    dtype = torch.bfloat16 if on_cuda else torch.float32
    tokens = [8] if chosen.small else [2048, 8192] if on_cuda else [128, 512]
    rate = matmul_rate(chosen.device, dtype, size=8192 if on_cuda else 256 if chosen.small else 1024)
    results = [
        result for m in tokens for ignored in (0.0, 0.5) for result in measure(head, m, ignored, dtype, rate, chosen)
    ]
    report(f"log-probabilities of {head.model}, {dtype}, {rate / 1e9:,.0f} GFLOP/s", results, chosen)


def measure(head: Head, tokens: int, ignored: float, dtype: torch.dtype, rate: float, chosen: Options) -> list[Result]:
    """Ours and PyTorch's own on one size; the floor counts only tokens that have a target."""
    torch.manual_seed(0)
    hidden_MH = torch.randn(tokens, head.hidden_size, device=chosen.device).to(dtype).requires_grad_()
    weight_VH = (torch.randn(head.vocab_size, head.hidden_size, device=chosen.device) / head.hidden_size**0.5).to(dtype)
    targets_M = torch.randint(head.vocab_size, (tokens,), device=chosen.device)
    targets_M[: int(ignored * tokens)] = -100

    def ours(hidden_MH: Tensor) -> Tensor:
        return logprobs(hidden_MH, weight_VH, targets_M[:, None])[:, 0]

    def eager(hidden_MH: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden_MH, weight_VH).float(), targets_M, reduction="none")

    _check(ours, eager, hidden_MH)
    competitors = {
        "xorl, forward": lambda: _forward(ours, hidden_MH),
        "eager, forward": lambda: _forward(eager, hidden_MH),
        "xorl, with backward": lambda: _forward_backward(ours, hidden_MH),
        "eager, with backward": lambda: _forward_backward(eager, hidden_MH),
    }
    product_s = 2 * (targets_M != -100).sum().item() * head.hidden_size * head.vocab_size / rate
    floors_s = {name: 2 * product_s if "backward" in name else product_s for name in competitors}
    return compare(f"{tokens}, {ignored:.0%} ignored", competitors, floors_s, chosen)


def _forward(function: Callable[[Tensor], Tensor], hidden_MH: Tensor) -> Tensor:
    with torch.no_grad():
        return function(hidden_MH)


def _forward_backward(function: Callable[[Tensor], Tensor], hidden_MH: Tensor) -> Tensor:
    (grad_MH,) = torch.autograd.grad(function(hidden_MH).sum(), hidden_MH)
    return grad_MH


def _check(ours: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], hidden_MH: Tensor) -> None:
    """A wrong answer is not worth timing."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[hidden_MH.dtype]
    for run in (_forward, _forward_backward):
        torch.testing.assert_close(run(ours, hidden_MH), run(eager, hidden_MH), rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    main()
