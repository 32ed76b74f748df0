"""xorl_kernels.logprobs against float64 log_softmax over full logits.

T: tokens; K: targets a token; H: hidden size; V: vocabulary; R: rank of the tail.
"""

import pytest
import torch
from torch import Tensor

from xorl_kernels.logprobs import logprobs

torch.set_num_threads(1)

H, V, R = 24, 97, 3
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-5), torch.bfloat16: dict(rtol=3e-2, atol=3e-2)}


def inputs(tokens: int, num_targets: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """hidden, weight, targets (a third ignored, every fourth row wholly), xa, b"""
    torch.manual_seed(seed)
    targets_TK = torch.randint(V, (tokens, num_targets))
    targets_TK[torch.rand(tokens, num_targets) < 0.33] = -100
    targets_TK[::4] = -100
    floats = [torch.randn(shape) for shape in ((tokens, H), (V, H), (tokens, R), (V, R))]
    hidden_TH, weight_VH, xa_TR, b_VR = ((x / 2).to(dtype) for x in floats)
    return [hidden_TH, weight_VH, targets_TK, xa_TR, b_VR]


def oracle(hidden_TH, weight_VH, targets_TK, xa_TR=None, b_VR=None, temperature=1.0) -> Tensor:
    logits_TV = hidden_TH @ weight_VH.T
    if xa_TR is not None:
        logits_TV = logits_TV + xa_TR @ b_VR.T
    picked_TK = (logits_TV / temperature).log_softmax(dim=1).gather(1, targets_TK.clamp(min=0))
    return torch.where(targets_TK == -100, 0, picked_TK)


def gradients(function, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `function` gives for leaves made of `tensors`, and the gradients of its sum under fixed random weights."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    output_TK = function(*leaves)
    factors_TK = torch.randn(output_TK.shape, generator=torch.Generator().manual_seed(7))
    return output_TK, list(torch.autograd.grad((output_TK * factors_TK).sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize(
    "differentiable", [("hidden",), ("hidden", "weight"), ("hidden", "tail"), ("hidden", "weight", "tail")]
)
def test_values_and_gradients(dtype, temperature, num_targets, differentiable):
    hidden_TH, weight_VH, targets_TK, xa_TR, b_VR = inputs(23, num_targets, dtype)
    frozen = {"weight": weight_VH} if "weight" not in differentiable else {}
    with_tail = "tail" in differentiable
    leaves = [hidden_TH, *([] if frozen else [weight_VH]), *([xa_TR, b_VR] if with_tail else [])]

    def arrange(wanted, leaves, convert):
        hidden, *rest = leaves
        weight = convert(frozen["weight"]) if frozen else rest.pop(0)
        return wanted(hidden, weight, rest)

    def ours(*leaves):
        return arrange(
            lambda h, w, tail: logprobs(
                h, w, targets_TK, temperature=temperature, chunk_tokens=5, tail=tuple(tail) or None
            ),
            leaves,
            lambda x: x,
        )

    def expected(*leaves):
        return arrange(
            lambda h, w, tail: oracle(h, w, targets_TK, *tail, temperature=temperature), leaves, Tensor.double
        )

    output_TK, grads = gradients(ours, leaves)
    expected_TK, expected_grads = gradients(expected, [x.double() for x in leaves])
    assert output_TK.dtype == torch.float32
    torch.testing.assert_close(output_TK, expected_TK.float(), rtol=1e-5, atol=1e-5)  # float32 even from bfloat16
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_the_same_to_the_bit_with_and_without_gradient(with_tail, weight_grad):
    hidden_TH, weight_VH, targets_TK, xa_TR, b_VR = inputs(31)
    tail = (xa_TR.requires_grad_(), b_VR) if with_tail else None
    trained_TK = logprobs(hidden_TH.requires_grad_(), weight_VH.requires_grad_(weight_grad), targets_TK, tail=tail)
    with torch.no_grad():
        scored_TK = logprobs(hidden_TH, weight_VH, targets_TK, tail=tail)
    assert trained_TK.requires_grad
    assert not scored_TK.requires_grad
    assert torch.equal(trained_TK, scored_TK)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 23, 1024])
def test_rows_and_chunks_do_not_depend_on_each_other(chunk_tokens):
    hidden_TH, weight_VH, targets_TK, *_ = inputs(23)
    together_TK = logprobs(hidden_TH, weight_VH, targets_TK, chunk_tokens=chunk_tokens)
    alone_TK = torch.cat([logprobs(hidden_TH[i : i + 1], weight_VH, targets_TK[i : i + 1]) for i in range(23)])
    torch.testing.assert_close(together_TK, alone_TK, rtol=1e-6, atol=1e-6)


def test_a_broken_row_stays_alone():
    hidden_TH, weight_VH, _, *_ = inputs(6)
    hidden_TH[2] = torch.nan
    hidden_TH.requires_grad_()
    output_T1 = logprobs(hidden_TH, weight_VH, torch.arange(6)[:, None])
    output_T1.sum().backward()
    others = torch.arange(6) != 2
    assert output_T1[others].isfinite().all()
    assert hidden_TH.grad[others].isfinite().all()
    assert output_T1[2].isnan().all()


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("num_targets", [1, 2])
def test_nothing_to_predict(tokens, num_targets):
    hidden_TH, weight_VH, targets_TK, *_ = inputs(tokens, num_targets)
    hidden_TH.requires_grad_()
    output_TK = logprobs(hidden_TH, weight_VH, torch.full_like(targets_TK, -100))
    output_TK.sum().backward()
    assert torch.equal(output_TK, torch.zeros(tokens, num_targets))
    assert torch.equal(hidden_TH.grad, torch.zeros(tokens, H))


def test_ignored_rows_get_exact_zeros_whatever_they_hold():
    hidden_TH, weight_VH, targets_TK, *_ = inputs(12)
    hidden_TH[0] = torch.inf  # row 0 has no target
    hidden_TH.requires_grad_()
    output_TK = logprobs(hidden_TH, weight_VH, targets_TK)
    output_TK.sum().backward()
    ignored_T = (targets_TK == -100).all(dim=1)
    assert (output_TK[ignored_T] == 0).all()
    assert (hidden_TH.grad[ignored_T] == 0).all()
    assert output_TK.isfinite().all()


def test_a_target_named_twice_counts_twice():
    hidden_TH, weight_VH, *_ = inputs(4)
    once = gradients(lambda h: 2 * logprobs(h, weight_VH, torch.full((4, 1), 5)), [hidden_TH])
    twice = gradients(lambda h: logprobs(h, weight_VH, torch.full((4, 2), 5)).sum(dim=1, keepdim=True), [hidden_TH])
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    hidden_TH, weight_VH, targets_TK, *_ = inputs(9)
    output_TK, (grad_TH,) = gradients(lambda h: logprobs(h, weight_VH, targets_TK), [hidden_TH * 1e4])
    assert output_TK.isfinite().all()
    assert grad_TH.isfinite().all()


def test_non_contiguous_inputs():
    hidden_TH, weight_VH, targets_TK, *_ = inputs(15)
    strided = logprobs(hidden_TH.T.contiguous().T, weight_VH.T.contiguous().T, targets_TK.repeat(1, 2)[:, ::2])
    torch.testing.assert_close(strided, logprobs(hidden_TH, weight_VH, targets_TK), rtol=1e-6, atol=1e-6)


def test_no_logits_are_kept():
    kept: list[int] = []
    hidden_TH, weight_VH, targets_TK, xa_TR, b_VR = inputs(64)

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        for tail in (None, (xa_TR, b_VR)):
            logprobs(hidden_TH.requires_grad_(), weight_VH, targets_TK, tail=tail)
    assert kept
    assert max(kept) <= V * H  # the weight itself; the logits would be 47 * V
