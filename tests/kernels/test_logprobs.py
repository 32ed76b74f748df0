"""xorl_kernels.logprobs: the reference against float64 log_softmax over full logits, the kernels against the reference.

T: tokens; C: those of one chunk; K: targets a token; J: most likely tokens; H: hidden size; V: vocabulary;
R: rank of the tail.
"""

from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xorl_kernels.logprobs import function, logprobs, reference, scores

# numpy, under the interpreter, says when a kernel computes the NaN that it is meant to.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
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


def test_no_slopes_are_made_without_autograd():
    hidden_TH, weight_VH, targets_TK, *_ = inputs(8)
    score_only = SimpleNamespace(score=reference.score)
    with torch.no_grad():
        scored = function.scores(hidden_TH.requires_grad_(), weight_VH, targets_TK, None, function.Ask(score_only))
    assert torch.equal(scored.logprobs_TK, logprobs(hidden_TH, weight_VH, targets_TK))


def test_soft_targets_are_weighted_log_probabilities():
    """Distillation: cross-entropy against a teacher's K most likely tokens."""
    hidden_TH, weight_VH, *_ = inputs(11)
    soft_TK, targets_TK = torch.randn(11, V).softmax(dim=1).topk(4)
    _, (grad_TH,) = gradients(lambda h: -(soft_TK * logprobs(h, weight_VH, targets_TK)).sum(dim=1), [hidden_TH])
    soft_TV = torch.zeros(11, V, dtype=torch.float64).scatter(1, targets_TK, soft_TK.double())

    def expected(hidden_TH):
        return torch.nn.functional.cross_entropy(hidden_TH @ weight_VH.double().T, soft_TV, reduction="none")

    _, (expected_grad_TH,) = gradients(expected, [hidden_TH.double()])
    torch.testing.assert_close(grad_TH.double(), expected_grad_TH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_targets", [1, 2])
@pytest.mark.parametrize("with_tail", [False, True])
def test_entropy_and_its_gradient(dtype, num_targets, with_tail):
    hidden_TH, weight_VH, targets_TK, *tail = inputs(17, num_targets, dtype)
    targets_TK[targets_TK == -100] = 3
    leaves = [hidden_TH, weight_VH, *tail] if with_tail else [hidden_TH, weight_VH]

    def ours(h, w, *tail):
        asked = dict(temperature=0.8, chunk_tokens=4, entropy="differentiable", tail=tail or None)
        scored = scores(h, w, targets_TK, **asked)
        return torch.cat([scored.logprobs_TK, scored.entropy_T[:, None]], dim=1)

    def expected(h, w, *tail):
        log_p_TV = ((h @ w.T + (tail[0] @ tail[1].T if tail else 0)) / 0.8).log_softmax(dim=1)
        entropy_T1 = -(log_p_TV.exp() * log_p_TV).sum(dim=1, keepdim=True)
        return torch.cat([log_p_TV.gather(1, targets_TK), entropy_T1], dim=1)

    output, grads = gradients(ours, leaves)
    expected_output, expected_grads = gradients(expected, [x.double() for x in leaves])
    torch.testing.assert_close(output, expected_output.float(), rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("num_targets", [1, 3])
def test_entropy_and_top_k_on_request(num_targets):
    hidden_TH, weight_VH, targets_TK, *_ = inputs(14, num_targets)
    hidden_TH.requires_grad_()
    asked = dict(temperature=1.3, chunk_tokens=4)
    logprobs_TK, entropy_T, top_k = scores(hidden_TH, weight_VH, targets_TK, entropy="value", top_k=5, **asked)
    assert torch.equal(logprobs_TK, logprobs(hidden_TH, weight_VH, targets_TK, **asked))
    assert logprobs_TK.requires_grad
    assert not entropy_T.requires_grad
    assert not top_k.logprobs_TJ.requires_grad
    log_p_TV = (hidden_TH.double() @ weight_VH.double().T / 1.3).log_softmax(dim=1).detach()
    top_TJ, ids_TJ = log_p_TV.topk(5)
    live_T = (targets_TK != -100).any(dim=1)
    expected_entropy_T = torch.where(live_T, -(log_p_TV.exp() * log_p_TV).sum(dim=1), 0)
    torch.testing.assert_close(entropy_T, expected_entropy_T.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top_k.logprobs_TJ, torch.where(live_T[:, None], top_TJ, 0).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(top_k.ids_TJ, torch.where(live_T[:, None], ids_TJ, -100))
    assert scores(hidden_TH, weight_VH, targets_TK)[1:] == (None, None)


@pytest.mark.parametrize("target", [V, -1])
def test_targets_outside_the_vocabulary_are_refused(target):
    hidden_TH, weight_VH, *_ = inputs(2)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        logprobs(hidden_TH, weight_VH, torch.full((2, 1), target))


def kernel_steps() -> ModuleType:
    from xorl_kernels.logprobs import kernel

    return kernel


def chunk_of_logits(content: str, rows: int, vocab: int) -> Tensor:
    logits_CV = torch.randn(rows, vocab) * {"large": 1e4, "peaked": 30.0}.get(content, 2.0)
    if content == "equal":
        logits_CV[:] = 1e4
    if content == "minus infinity":
        logits_CV[:, 1:][torch.rand(rows, vocab - 1) < 0.5] = -torch.inf
    return logits_CV


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from([1, 2, 97, 4096, 4099, 10_007]),
    num_targets=st.integers(1, 8),
    content=st.sampled_from(["plain", "peaked", "large", "equal", "minus infinity"]),
    temperature=st.sampled_from([1.0, 0.5, 0.7, 2.0]),
    entropy=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_kernels_are_the_reference(device, rows, vocab, num_targets, content, temperature, entropy, dtype, seed):
    torch.manual_seed(seed)
    logits_CV = chunk_of_logits(content, rows, vocab)
    targets_CK = torch.randint(vocab, (rows, num_targets)).masked_fill_(torch.rand(rows, num_targets) < 0.3, -100)
    dlogprobs_CK = torch.randn(rows, num_targets).masked_fill_(targets_CK == -100, 0.0)
    dentropy_C1 = torch.randn(rows, 1) if entropy else None

    def run(steps, device):
        logits, targets, dlogprobs = logits_CV.clone().to(device), targets_CK.to(device), dlogprobs_CK.to(device)
        dentropy = None if dentropy_C1 is None else dentropy_C1.to(device)
        scored = steps.score(logits, targets, temperature, entropy=entropy)
        dlogits = steps.dlogits(logits, targets, scored, dlogprobs, dentropy, temperature, dtype)
        assert dlogits.dtype == dtype
        return [*(x.cpu() for x in scored if x is not None), dlogits.float().cpu()]

    *scored, dlogits_CV = run(kernel_steps(), device)
    *expected_scored, expected_dlogits_CV = run(reference, torch.device("cpu"))
    scale = logits_CV.masked_fill(logits_CV == -torch.inf, 0.0).abs().max().item() / temperature
    exact = 2e-7 * scale + 2e-6  # z is rounded once by the quotient there, once by the product here
    torch.testing.assert_close(scored, expected_scored, rtol=1e-5 + exact, atol=exact)
    rounding = {torch.bfloat16: 2**-7, torch.float32: 1e-5}[dtype]
    size = num_targets * 4 / temperature * (1 + scale * entropy)  # of the terms that cancel
    torch.testing.assert_close(dlogits_CV, expected_dlogits_CV, rtol=rounding + exact, atol=exact * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("entropy", [None, "value", "differentiable"])
@pytest.mark.parametrize("with_tail", [False, True])
def test_the_whole_function_through_the_kernels(device, dtype, num_targets, entropy, with_tail):
    hidden_TH, weight_VH, targets_TK, xa_TR, b_VR = inputs(7, num_targets, dtype)
    leaves = [hidden_TH, xa_TR, b_VR] if with_tail else [hidden_TH]

    def through(steps, device):
        ask = function.Ask(steps, temperature=0.7, chunk_tokens=2, entropy=entropy, top_k=3)

        def call(hidden_TH, *tail):
            scored = function.scores(hidden_TH, weight_VH.to(device), targets_TK, tail or None, ask)
            entropies = () if scored.entropy_T is None else (scored.entropy_T[:, None],)
            return torch.cat([scored.logprobs_TK, *entropies, scored.top_k.logprobs_TJ], dim=1).cpu()

        output, grads = gradients(call, [x.to(device) for x in leaves])
        return [output, *(grad.float().cpu() for grad in grads)]

    output, *grads = through(kernel_steps(), device)
    expected_output, *expected_grads = through(reference, torch.device("cpu"))
    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, expected_grads, **TOLERANCE[dtype])


def test_the_gradient_takes_the_memory_of_the_logits(device):
    logits_CV = torch.randn(3, 4099, device=device)
    targets_C1 = torch.tensor([[5], [4098], [0]], device=device)
    scored = kernel_steps().score(logits_CV, targets_C1, 1.0, entropy=False)
    ones_C1 = torch.ones(3, 1, device=device)
    dlogits_CV = kernel_steps().dlogits(logits_CV, targets_C1, scored, ones_C1, None, 1.0, torch.bfloat16)
    assert dlogits_CV.data_ptr() == logits_CV.data_ptr()
    assert dlogits_CV.untyped_storage().nbytes() == 4 * logits_CV.numel()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_of_logits_stays_alone(device, broken):
    logits_CV = torch.randn(3, 4099, device=device)
    logits_CV[1, 4097] = broken
    targets_CK = torch.tensor([[5, 7], [4, -100], [0, 1]], device=device)
    scored = kernel_steps().score(logits_CV, targets_CK, 1.0, entropy=True)
    dlogprobs_CK, dentropy_C1 = torch.ones(3, 2, device=device), torch.ones(3, 1, device=device)
    dlogits_CV = kernel_steps().dlogits(logits_CV, targets_CK, scored, dlogprobs_CK, dentropy_C1, 1.0, torch.bfloat16)
    assert scored.logprobs_CK[1, 0].isnan()
    assert scored.logprobs_CK[1, 1] == 0
    assert scored.entropy_C1[1].isnan()
    assert dlogits_CV[1].isnan().all()
    for x in (scored.logprobs_CK, scored.entropy_C1, dlogits_CV):
        assert x[[0, 2]].isfinite().all()


def test_logits_without_any_weight_are_nan(device):
    targets_C1 = torch.tensor([[3]], device=device)
    scored = kernel_steps().score(torch.full((1, 97), -torch.inf, device=device), targets_C1, 1.0, entropy=True)
    assert scored.logprobs_CK.isnan().all()


def test_a_target_outside_the_vocabulary_scores_nan(device):
    targets_CK = torch.tensor([[V, -1, 3]], device=device)
    scored = kernel_steps().score(torch.randn(1, V, device=device), targets_CK, 1.0, entropy=False)
    assert scored.logprobs_CK.isnan().tolist() == [[True, True, False]]


def test_a_launcher_refuses_what_its_kernel_cannot_read(device):
    targets_CK = torch.zeros(2, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="contiguous float32"):
        kernel_steps().score(torch.randn(V, 2, device=device).T, targets_CK, 1.0, entropy=False)
    with pytest.raises(ValueError, match="targets_CK must be"):
        kernel_steps().score(torch.randn(3, V, device=device), targets_CK, 1.0, entropy=False)
