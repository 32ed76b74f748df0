"""xorl.engine.losses against the formulas of the API, in float64 and token by token.

T: tokens; K: targets a token.
"""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from xorl import types
from xorl.engine import losses
from xorl.engine.losses import LossInputs
from xorl.errors import InvalidRequest
from xorl.types import (
    AnyLoss,
    CausalLmLoss,
    Cispo,
    CrossEntropy,
    DrGrpo,
    Dro,
    Gspo,
    ImportanceSampling,
    PolicyLoss,
    Ppo,
    RlLoss,
)

torch.set_num_threads(1)

RL_LOSSES = [
    ImportanceSampling(),
    Ppo(),
    Ppo(clip_low_threshold=0.5, clip_high_threshold=3.0),
    Cispo(),
    Cispo(clip_low_threshold=0.8, clip_high_threshold=1.2),
    Dro(),
    Dro(beta=2.0),
    Gspo(),
    Gspo(clip_low_threshold=0.99, clip_high_threshold=1.01),
    PolicyLoss(),
    PolicyLoss(eps_clip=0.1, eps_clip_high=0.3, eps_clip_c=3.0),
    PolicyLoss(use_tis=True),
    PolicyLoss(use_tis=True, tis_clip_low=0.9, tis_clip_high=1.1, icepop_beta=1.5, eps_clip_c=1.7),
    PolicyLoss(icepop_beta=1.1),
    DrGrpo(),
    DrGrpo(beta=0.1),
    DrGrpo(beta=0.1, kl_type="k1"),
    DrGrpo(beta=0.1, kl_type="k2"),
    DrGrpo(ratio_type="sequence", beta=0.3),
]
ALL_LOSSES = [CrossEntropy(), CausalLmLoss(), *RL_LOSSES]


def inputs(lengths: list[int], seed: int = 0, spread: float = 0.5, num_targets: int = 1) -> tuple[Tensor, LossInputs]:
    """Log-probabilities and inputs in which every sort of token occurs; weights fractional, negative and zero."""
    torch.manual_seed(seed)
    total = sum(lengths)
    targets_TK = torch.randint(0, 50, (total, num_targets))
    targets_TK[torch.rand(total, num_targets) < 0.2] = -100
    logprobs_TK = -torch.rand(total, num_targets) * 4 - 0.01
    arrays = {
        name: (logprobs_TK[:, 0] + spread * torch.randn(total)).clamp(max=0)
        for name in ("logprobs", "rollout_logprobs", "ref_logprobs")
    }
    arrays["advantages"] = torch.randn(total) * (torch.rand(total) < 0.8)
    arrays["weights"] = torch.randn(total, num_targets) * (torch.rand(total, num_targets) < 0.9)
    arrays["sequence_ratio_mask"] = (torch.rand(total) < 0.7).float()
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return logprobs_TK, LossInputs(targets_TK, offsets, arrays)


def change(x: LossInputs, **arrays: Tensor) -> LossInputs:
    return LossInputs(x.targets_TK, x.offsets, {**x.arrays, **arrays})


def without(x: LossInputs, *names: str) -> LossInputs:
    return LossInputs(x.targets_TK, x.offsets, {k: v for k, v in x.arrays.items() if k not in names})


def of_datum(x: LossInputs, i: int) -> LossInputs:
    cut = slice(x.offsets[i], x.offsets[i + 1])
    arrays = {name: array[cut] for name, array in x.arrays.items()}
    return LossInputs(x.targets_TK[cut], [0, cut.stop - cut.start], arrays)


def run(loss: AnyLoss, logprobs_TK: Tensor, x: LossInputs) -> tuple[Tensor, Tensor]:
    """The loss of each token and the gradient of its sum."""
    leaf_TK = logprobs_TK.detach().clone().requires_grad_()
    loss_T = losses.elementwise(loss, leaf_TK, x)
    loss_T.sum().backward()
    assert leaf_TK.grad is not None
    return loss_T.detach(), leaf_TK.grad


# The oracle: one token at a time, straight from the formulas, with Python's own min and max as branches.


def oracle(loss: AnyLoss, logprobs_TK: Tensor, x: LossInputs) -> tuple[Tensor, Tensor]:
    leaf_TK = logprobs_TK.detach().double().requires_grad_()
    arrays = {name: array.double() for name, array in x.arrays.items()}
    weights_TK = arrays.get("weights", torch.ones(x.targets_TK.shape, dtype=torch.float64))
    loss_of = []
    for start, stop in zip(x.offsets, x.offsets[1:], strict=False):
        for i in range(start, stop):
            if (x.targets_TK[i] == -100).all():
                loss_of.append(torch.zeros((), dtype=torch.float64))
            elif isinstance(loss, CrossEntropy | CausalLmLoss):
                terms = [
                    weights_TK[i, k] * leaf_TK[i, k] for k in range(leaf_TK.shape[1]) if x.targets_TK[i, k] != -100
                ]
                loss_of.append(-torch.stack(terms).sum())
            else:
                ratio = token_ratio(loss, leaf_TK[:, 0], arrays, x, i, range(start, stop))
                token = {name: array[i] for name, array in arrays.items() if name != "weights"}
                loss_of.append(weights_TK[i, 0] * rl_token(loss, leaf_TK[i, 0], ratio, token))
    total = torch.stack(loss_of).sum() + 0 * leaf_TK.sum()
    total.backward()
    assert leaf_TK.grad is not None
    return torch.stack(loss_of).detach(), leaf_TK.grad


def token_ratio(loss, l_T, arrays, x, i, datum) -> Tensor:
    sequence = isinstance(loss, Gspo) or (isinstance(loss, DrGrpo) and loss.ratio_type == "sequence")
    if not sequence:
        return (l_T[i] - arrays["logprobs"][i]).exp()
    mask = arrays.get("sequence_ratio_mask") if isinstance(loss, Gspo) else None
    mask = arrays["advantages"] if mask is None else mask
    chosen = [j for j in datum if mask[j] != 0 and x.targets_TK[j, 0] != -100]
    log_s = sum(float(l_T[j].detach() - arrays["logprobs"][j]) for j in chosen) / max(len(chosen), 1)
    return (l_T[i] - l_T[i].detach() + log_s).exp()


def clip(value, low, high):
    return min(max(value, low), high)


def clipped_surrogate(r: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    held = clip(r.item(), low, high)
    free, bound = -r * advantage, -held * advantage
    return max(free, bound, key=Tensor.item)  # the first of equals: no bound holds, the gradient is free's


def rl_token(loss: AnyLoss, ell: Tensor, r: Tensor, token: dict[str, Tensor]) -> Tensor:
    q, advantage = token["logprobs"], token["advantages"]
    match loss:
        case ImportanceSampling():
            return -(ell - q).clamp(-20, 20).exp() * advantage
        case Ppo() | Gspo():
            return clipped_surrogate(r, advantage, loss.clip_low_threshold, loss.clip_high_threshold)
        case Cispo():
            return -clip(r.item(), loss.clip_low_threshold, loss.clip_high_threshold) * ell * advantage
        case Dro():
            return -(ell * advantage - loss.beta / 2 * (ell - q) ** 2)
        case PolicyLoss():
            value = clipped_surrogate(r, advantage, 1 - loss.eps_clip, 1 + loss.eps_clip_high)
            if loss.eps_clip_c is not None and advantage < 0:
                value = min(value, -loss.eps_clip_c * advantage, key=Tensor.item)
            if loss.icepop_beta is not None and not 1 / loss.icepop_beta <= r.item() <= loss.icepop_beta:
                value = value.detach()
            if loss.use_tis and "rollout_logprobs" in token:
                truncated = (ell - token["rollout_logprobs"]).exp().item()
                value = value * clip(truncated, loss.tis_clip_low, loss.tis_clip_high)
            return value
        case DrGrpo():
            value = clipped_surrogate(r, advantage, 1 - loss.clip_low, 1 + loss.clip_high)
            if loss.beta == 0:
                return value
            d = ell - token["ref_logprobs"]
            held = d.clamp(-10, 10)
            return value + loss.beta * {"k1": d, "k2": d**2 / 2, "k3": (-held).exp() + held - 1}[loss.kl_type]
        case _:
            raise AssertionError(loss)


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=str)
@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 12], [3, 0, 9, 5]])
def test_value_and_gradient_are_the_formulas(loss, spread, lengths):
    for seed in range(3):
        logprobs_TK, x = inputs(lengths, seed, spread)
        expected = oracle(loss, logprobs_TK, x)
        for actual, wanted in zip(run(loss, logprobs_TK, x), expected, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual.double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss", [CrossEntropy(), CausalLmLoss()])
def test_soft_targets(loss):
    logprobs_TK, x = inputs([5, 8], num_targets=3)
    for actual, wanted in zip(run(loss, logprobs_TK, x), oracle(loss, logprobs_TK, x), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=str)
def test_optional_inputs_may_be_absent(loss):
    logprobs_TK, x = inputs([6, 9])
    x = without(x, "weights", "rollout_logprobs", "sequence_ratio_mask")
    for actual, wanted in zip(run(loss, logprobs_TK, x), oracle(loss, logprobs_TK, x), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=str)
def test_two_datums_together_are_the_same_as_apart(loss):
    logprobs_TK, x = inputs([6, 11])
    apart = [run(loss, logprobs_TK[x.offsets[i] : x.offsets[i + 1]], of_datum(x, i)) for i in range(2)]
    together = run(loss, logprobs_TK, x)
    for actual, parts in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.equal(actual, torch.cat(parts))
    counts = [losses.num_valid(loss, of_datum(x, i)) for i in range(2)]
    assert losses.num_valid(loss, x) == sum(counts)


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=str)
@pytest.mark.parametrize("lengths", [[4, 2], [0], []])
def test_no_valid_token(loss, lengths):
    logprobs_TK, x = inputs(lengths)
    x = LossInputs(torch.full_like(x.targets_TK, -100), x.offsets or [0], x.arrays)
    loss_T, grad_TK = run(loss, logprobs_TK, x)
    metrics = losses.metrics(loss, logprobs_TK, loss_T, x)
    assert torch.equal(loss_T, torch.zeros_like(loss_T))
    assert torch.equal(grad_TK, torch.zeros_like(grad_TK))
    assert losses.num_valid(loss, x) == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["loss:sum"] == metrics["loss:mean"] == metrics["valid_tokens:sum"] == 0


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=str)
def test_ignored_tokens_are_inert_whatever_their_inputs(loss):
    logprobs_TK, x = inputs([20])
    ignored_T = (x.targets_TK == -100).all(dim=1)
    assert ignored_T.any()
    wild = {name: torch.where(ignored_T, -500.0, x.arrays[name]) for name in ("logprobs", "rollout_logprobs")}
    actual = run(loss, logprobs_TK, change(x, **wild))
    assert torch.equal(actual[0], run(loss, logprobs_TK, x)[0])
    assert (actual[0][ignored_T] == 0).all()
    assert (actual[1][ignored_T] == 0).all()


CLIPPED = [Ppo(), Gspo(), PolicyLoss(), DrGrpo(), PolicyLoss(eps_clip_c=3.0)]


@pytest.mark.parametrize("loss", [*CLIPPED, Cispo(), ImportanceSampling(), DrGrpo(beta=0.1)], ids=str)
@pytest.mark.parametrize("advantage", [0.0, 2.0, -2.0])
@pytest.mark.parametrize("log_ratio", [-1000.0, -30.0, 30.0, 1000.0])
def test_extreme_ratios_give_no_nan(loss, advantage, log_ratio):
    logprobs_TK = torch.tensor([[min(log_ratio, 0.0) - 0.5]])
    arrays = {
        "logprobs": logprobs_TK[:, 0] - log_ratio,
        "advantages": torch.tensor([advantage]),
        "ref_logprobs": logprobs_TK[:, 0] + log_ratio,
    }
    loss_T, grad_TK = run(loss, logprobs_TK, LossInputs(torch.tensor([[1]]), [0, 1], arrays))
    unbounded = (
        advantage < 0 and log_ratio == 1000 and loss in (Ppo(), Gspo(), PolicyLoss(), DrGrpo(), DrGrpo(beta=0.1))
    )
    assert loss_T.isfinite().all() != unbounded  # an infinite loss is reported as what it is
    assert not loss_T.isnan().any()
    assert grad_TK.isfinite().all() != unbounded
    assert not grad_TK.isnan().any()


def one_token(ratio: float, advantage: float, **arrays: float) -> tuple[Tensor, LossInputs]:
    """A token whose ratio is `ratio` to the bit: l = log ratio + q is exact at q = 0."""
    tensors = {name: torch.tensor([value]) for name, value in arrays.items()}
    given = {"logprobs": torch.zeros(1), "advantages": torch.tensor([advantage])} | tensors
    return torch.tensor([[ratio]]).log(), LossInputs(torch.tensor([[1]]), [0, 1], given)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("at_low", [True, False])
def test_a_ratio_on_the_threshold_is_not_clipped(advantage, at_low):
    logprobs_TK, x = one_token(0.5 if at_low else 2.0, advantage)
    ratio = float(logprobs_TK.exp())  # the threshold is put where the ratio is, to the bit
    loss = Ppo(clip_low_threshold=ratio if at_low else 0.1, clip_high_threshold=9.0 if at_low else ratio)
    loss_T, grad_TK = run(loss, logprobs_TK, x)
    assert loss_T.item() == pytest.approx(-ratio * advantage)
    assert grad_TK.item() == pytest.approx(-ratio * advantage)
    assert losses.metrics(loss, logprobs_TK, loss_T, x)["clip_fraction:mean"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # held by the upper bound
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),  # held by the lower bound
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_the_active_branch_of_the_clip_decides(ratio, advantage, value, slope):
    logprobs_TK, x = one_token(ratio, advantage)
    for loss in (Ppo(), PolicyLoss(), Gspo()):
        loss_T, grad_TK = run(loss, logprobs_TK, x)
        assert (loss_T.item(), grad_TK.item()) == (pytest.approx(value), pytest.approx(slope))


def test_dual_clip_caps_the_loss_of_a_bad_action():
    loss = PolicyLoss(eps_clip_c=3.0)
    for ratio, value, slope in [(2.0, 2.0, 2.0), (5.0, 3.0, 0.0)]:
        loss_T, grad_TK = run(loss, *one_token(ratio, -1.0))
        assert (loss_T.item(), grad_TK.item()) == (pytest.approx(value), pytest.approx(slope))


def test_tis_scales_the_gradient_too():
    logprobs_TK, x = one_token(1.0, 1.0, rollout_logprobs=math.log(1 / 1.5))
    plain, scaled = run(PolicyLoss(), logprobs_TK, x), run(PolicyLoss(use_tis=True), logprobs_TK, x)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, 1.5 * one)
    assert torch.equal(run(PolicyLoss(use_tis=True), logprobs_TK, without(x, "rollout_logprobs"))[1], plain[1])


def test_icepop_stops_the_gradient_and_leaves_the_value():
    logprobs_TK, x = one_token(3.0, -1.0)
    loss_T, grad_TK = run(PolicyLoss(icepop_beta=2.0), logprobs_TK, x)
    assert loss_T.item() == pytest.approx(3.0)
    assert grad_TK.item() == 0


def test_cispo_never_loses_a_token():
    loss_T, grad_TK = run(Cispo(clip_low_threshold=0.8, clip_high_threshold=1.2), *one_token(5.0, 1.0))
    assert grad_TK.item() == pytest.approx(-1.2)
    assert loss_T.item() == pytest.approx(-1.2 * math.log(5.0))


def test_importance_sampling_holds_the_log_ratio():
    logprobs_TK, x = one_token(math.exp(25), 1.0)
    loss_T, grad_TK = run(ImportanceSampling(), logprobs_TK, x)
    assert loss_T.item() == pytest.approx(-math.exp(20))
    assert grad_TK.item() == 0


def test_ppo_is_policy_loss_in_other_words():
    logprobs_TK, x = inputs([30])
    assert torch.equal(run(Ppo(), logprobs_TK, x)[1], run(PolicyLoss(), logprobs_TK, x)[1])


def test_gspo_ratio_leaves_the_masked_tokens_out():
    logprobs_TK, x = inputs([6, 6])
    mask_T = torch.tensor([1.0, 1, 0, 1, 0, 1] * 2)
    x = LossInputs(x.targets_TK.clamp(min=0), x.offsets, x.arrays | {"sequence_ratio_mask": mask_T})
    wild = change(x, logprobs=torch.where(mask_T == 0, -300.0, x.arrays["logprobs"]))
    assert torch.equal(run(Gspo(), logprobs_TK, x)[0], run(Gspo(), logprobs_TK, wild)[0])


def test_gspo_without_a_mask_leaves_prompts_out():
    logprobs_TK, x = inputs([6])
    x = LossInputs(x.targets_TK.clamp(min=0), x.offsets, x.arrays)
    advantages_T = torch.tensor([0.0, 0, 0, 1, 1, 1])
    x = change(x, advantages=advantages_T, logprobs=x.arrays["logprobs"] * (advantages_T != 0))
    masked = change(x, sequence_ratio_mask=(advantages_T != 0).float())
    assert torch.equal(
        run(Gspo(), logprobs_TK, without(x, "sequence_ratio_mask"))[0], run(Gspo(), logprobs_TK, masked)[0]
    )


def test_drgrpo_needs_ref_logprobs_for_its_kl():
    logprobs_TK, x = inputs([4])
    x = without(x, "ref_logprobs")
    losses.elementwise(DrGrpo(), logprobs_TK, x)
    with pytest.raises(InvalidRequest, match=r"loss_fn_inputs\.ref_logprobs"):
        losses.elementwise(DrGrpo(beta=0.1), logprobs_TK, x)


def test_num_valid_counts_what_has_target_weight_and_advantage():
    x = LossInputs(
        torch.tensor([[1], [-100], [2], [3]]),
        [0, 4],
        {
            "weights": torch.tensor([[1.0], [1.0], [0.0], [-0.5]]),
            "advantages": torch.tensor([0.0, 1.0, 1.0, 1.0]),
            "logprobs": torch.zeros(4),
        },
    )
    assert losses.num_valid(CrossEntropy(), x) == 2
    assert losses.num_valid(Ppo(), x) == 1
    assert losses.num_valid(Ppo(), without(x, "weights")) == 2
    assert losses.num_valid(CrossEntropy(), without(x, "weights")) == 3


EVERY_RL_KEY = {
    "loss:sum", "loss:mean", "valid_tokens:sum", "ratio_mean:mean", "ratio_min:min", "ratio_max:max",
    "kl_sample_train_k3:mean", "entropy_sample:mean",
}  # fmt: skip
TIS_KEYS = {"tis_mean:mean", "tis_min:min", "tis_max:max", "tis_clipfrac:mean"}


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        (ImportanceSampling(), set()),
        (Dro(), set()),
        (Ppo(), {"clip_fraction:mean"}),
        (Gspo(), {"clip_fraction:mean"}),
        (Cispo(), {"clip_fraction:mean"}),
        (DrGrpo(), {"pg_clipfrac:mean"}),
        (PolicyLoss(), {"pg_clipfrac:mean"}),
        (PolicyLoss(use_tis=True, icepop_beta=2.0), {"pg_clipfrac:mean", "icepop_maskfrac:mean", *TIS_KEYS}),
    ],
    ids=str,
)
def test_metric_keys(loss, more):
    logprobs_TK, x = inputs([10])
    metrics = losses.metrics(loss, logprobs_TK, run(loss, logprobs_TK, x)[0], x)
    assert set(metrics) == EVERY_RL_KEY | more
    assert all(key.count(":") == 1 and type(value) is float for key, value in metrics.items())


def test_metrics_are_over_the_tokens_that_count():
    logprobs_TK, x = inputs([12, 9])
    loss = PolicyLoss(use_tis=True, icepop_beta=1.3)
    loss_T, _ = run(loss, logprobs_TK, x)
    metrics = losses.metrics(loss, logprobs_TK, loss_T, x)
    keep = (x.targets_TK[:, 0] != -100) & (x.arrays["advantages"] != 0) & (x.arrays["weights"][:, 0] != 0)
    ell, q, rollout, advantage = (
        array[keep].double()
        for array in (logprobs_TK[:, 0], x.arrays["logprobs"], x.arrays["rollout_logprobs"], x.arrays["advantages"])
    )
    ratio, tis = (ell - q).exp(), (ell - rollout).exp()
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    expected = {
        "loss:sum": loss_T.double().sum(),
        "loss:mean": loss_T.double().sum() / keep.sum(),
        "valid_tokens:sum": keep.sum(),
        "ratio_mean:mean": ratio.mean(),
        "ratio_min:min": ratio.min(),
        "ratio_max:max": ratio.max(),
        "kl_sample_train_k3:mean": (ratio - ratio.log() - 1).mean(),
        "entropy_sample:mean": -q.mean(),
        "pg_clipfrac:mean": clipped.double().mean(),
        "icepop_maskfrac:mean": ((ratio < 1 / 1.3) | (ratio > 1.3)).double().mean(),
        "tis_mean:mean": tis.clamp(0.1, 2).mean(),
        "tis_min:min": tis.clamp(0.1, 2).min(),
        "tis_max:max": tis.clamp(0.1, 2).max(),
        "tis_clipfrac:mean": ((tis < 0.1) | (tis > 2)).double().mean(),
    }
    assert metrics == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-5, abs=1e-6)


def test_metrics_stay_finite_at_extreme_ratios():
    logprobs_TK, x = one_token(1.0, 1.0)
    x = change(x, logprobs=torch.tensor([-3000.0]))
    metrics = losses.metrics(Ppo(), logprobs_TK, run(Ppo(), logprobs_TK, x)[0], x)
    assert all(math.isfinite(value) for value in metrics.values())


def test_temperature_is_an_option_of_policy_loss_alone():
    assert losses.temperature(PolicyLoss(logprob_temperature=0.6)) == 0.6
    assert {losses.temperature(loss()) for loss in types.LOSSES} == {1.0}


def test_elementwise_losses_are_reported_for_supervised_losses():
    assert losses.reports_elementwise(CrossEntropy())
    assert not losses.reports_elementwise(CausalLmLoss(return_per_token=False))
    assert not any(losses.reports_elementwise(loss) for loss in RL_LOSSES)


def test_every_loss_is_in_every_table():
    names = {loss.__struct_config__.tag for loss in types.LOSSES}
    assert names == set(get_args(types.LossFnName))
    assert set(types.LOSSES) == set(get_args(types.AnyLoss)) == {type(loss) for loss in ALL_LOSSES}
    assert set(get_args(losses.RlLosses)) == {loss for loss in types.LOSSES if issubclass(loss, RlLoss)}
