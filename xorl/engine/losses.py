"""Turns log-probabilities of targets into losses.

T: tokens of the datums at hand; K: targets a token (1, but for soft targets); N: datums.
In formulas l is logprobs (of the current weights), q the sampling policy's, A the advantage, w the weight,
r = exp(l − q), sg stops the gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from xorl.errors import InvalidRequest
from xorl.types import (
    IGNORED_TARGET,
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
)

RlLosses = ImportanceSampling | Ppo | Cispo | Dro | Gspo | PolicyLoss | DrGrpo
ClippedLosses = Ppo | Gspo | PolicyLoss | DrGrpo

MAX_LOG_RATIO = 20.0
"""importance_sampling and the statistics hold l - q within ± this."""

MAX_LOG_RATIO_K3 = 10.0


@dataclass(frozen=True)
class LossInputs:
    """What the losses of some whole datums are computed from; tensors on one device.

    Attributes:
        targets_TK: int64; -100 is ignored.
        offsets: [N + 1], where each datum begins.
        arrays: loss_fn_inputs by name, float32 [T] each, but weights [T, K]. DrGrpo's old_logprobs is here as logprobs.
    """

    targets_TK: Tensor
    offsets: Sequence[int]
    arrays: Mapping[str, Tensor]

    @property
    def weights_TK(self) -> Tensor:
        weights_TK = self.arrays.get("weights")
        return torch.ones_like(self.targets_TK, dtype=torch.float32) if weights_TK is None else weights_TK

    @property
    def valid_T(self) -> Tensor:
        return (self.targets_TK != IGNORED_TARGET).any(dim=1)


def temperature(loss: AnyLoss) -> float:
    """What the logits are divided by before a loss sees their log-probabilities."""
    return loss.logprob_temperature if isinstance(loss, PolicyLoss) else 1.0


def elementwise(loss: AnyLoss, logprobs_TK: Tensor, x: LossInputs) -> Tensor:
    """The loss of each token.

    Args:
        logprobs_TK: log p(target) at `temperature(loss)`, float32; the gradient goes there.

    Returns:
        [T] float32; its sum is the objective. 0, and without gradient, at ignored tokens.

    Raises:
        InvalidRequest: DrGrpo with beta > 0 lacks ref_logprobs.
    """
    match loss:
        case CrossEntropy() | CausalLmLoss():
            return _cross_entropy(logprobs_TK, x)
        case ImportanceSampling() | Ppo() | Cispo() | Dro() | Gspo() | PolicyLoss() | DrGrpo():
            t = _tokens(logprobs_TK, x)
            return torch.where(x.valid_T, x.weights_TK[:, 0] * _policy_gradient(loss, t), 0.0)
        case _:
            assert_never(loss)


def reports_elementwise(loss: AnyLoss) -> bool:
    """Whether clients get the loss of each token."""
    return isinstance(loss, CrossEntropy | CausalLmLoss) and loss.return_per_token


def num_valid(loss: AnyLoss, x: LossInputs) -> Tensor:
    """How many tokens count in a mean: those with a target, a weight and, for RL, an advantage. int64 []."""
    return _counted(loss, x).sum()


def metrics(loss: AnyLoss, logprobs_TK: Tensor, loss_T: Tensor, x: LossInputs) -> dict[str, float]:
    """What a whole request reports; the part of each key after its colon says how to combine two requests.

    Args:
        logprobs_TK, loss_T: what `elementwise` got and gave for all datums of the request.
    """
    counted_T = _counted(loss, x)
    total, count = loss_T.detach().double().sum(), counted_T.sum()
    values = {"loss:sum": total, "loss:mean": total / count.clamp(min=1), "valid_tokens:sum": count}
    match loss:
        case CrossEntropy() | CausalLmLoss():
            pass
        case ImportanceSampling() | Ppo() | Cispo() | Dro() | Gspo() | PolicyLoss() | DrGrpo():
            values |= _statistics(loss, _tokens(logprobs_TK.detach(), x), counted_T)
        case _:
            assert_never(loss)
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))


def _cross_entropy(logprobs_TK: Tensor, x: LossInputs) -> Tensor:
    """− Σ_k w_k l_k, with weights of either sign."""
    return -torch.where(x.targets_TK == IGNORED_TARGET, 0.0, x.weights_TK * logprobs_TK).sum(dim=1)


@dataclass(frozen=True)
class _Tokens:
    """The RL losses' arguments, 0 at ignored tokens, so that no overflow there reaches a gradient."""

    x: LossInputs
    logprobs_T: Tensor
    sampling_T: Tensor
    advantages_T: Tensor

    @property
    def log_ratio_T(self) -> Tensor:
        return self.logprobs_T - self.sampling_T

    @property
    def ratio_T(self) -> Tensor:
        return self.log_ratio_T.detach().exp()

    def log_ratio_to(self, name: str) -> Tensor | None:
        """l minus another policy's log-probabilities, if the request has them."""
        other_T = self.x.arrays.get(name)
        return None if other_T is None else self.logprobs_T - torch.where(self.x.valid_T, other_T, 0.0)


def _tokens(logprobs_TK: Tensor, x: LossInputs) -> _Tokens:
    zeroed = (
        torch.where(x.valid_T, values_T, 0.0)
        for values_T in (logprobs_TK[:, 0], x.arrays["logprobs"], x.arrays["advantages"])
    )
    return _Tokens(x, *zeroed)


def _policy_gradient(loss: RlLosses, t: _Tokens) -> Tensor:
    match loss:
        case ImportanceSampling():
            return _importance_sampling(t)
        case Ppo() | Gspo():
            return _surrogate(loss, t)
        case Cispo():
            return _cispo(loss, t)
        case Dro():
            return _dro(loss, t)
        case PolicyLoss():
            return _policy_loss(loss, t)
        case DrGrpo():
            return _dr_grpo(loss, t)
        case _:
            assert_never(loss)


def _importance_sampling(t: _Tokens) -> Tensor:
    """− r A. Source: Schulman et al. 2015 (TRPO), the importance-sampled surrogate."""
    return -t.log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * t.advantages_T


def _cispo(loss: Cispo, t: _Tokens) -> Tensor:
    """− sg(clip(r, low, high)) l A: no token loses its gradient. Source: MiniMax 2025 (MiniMax-M1)."""
    return -t.ratio_T.clamp(loss.clip_low_threshold, loss.clip_high_threshold) * t.logprobs_T * t.advantages_T


def _dro(loss: Dro, t: _Tokens) -> Tensor:
    """− (l A − β/2 (l − q)²). Source: Richemond et al. 2024 (Direct Reward Optimisation)."""
    return -(t.logprobs_T * t.advantages_T - loss.beta / 2 * t.log_ratio_T.square())


def _policy_loss(loss: PolicyLoss, t: _Tokens) -> Tensor:
    """The clipped surrogate; IcePop stops the gradient where r ∉ [1/b, b], TIS scales loss and gradient by t.

    Source: Yao et al. 2025 (truncated importance sampling); Ling Team 2025 (IcePop).
    """
    loss_T = _surrogate(loss, t)
    if loss.icepop_beta is not None:
        loss_T = torch.where(_icepopped(loss.icepop_beta, t), loss_T.detach(), loss_T)
    tis_ratio_T = _tis_ratio(loss, t)
    return loss_T if tis_ratio_T is None else loss_T * tis_ratio_T.clamp(loss.tis_clip_low, loss.tis_clip_high)


def _dr_grpo(loss: DrGrpo, t: _Tokens) -> Tensor:
    """The clipped surrogate + β KL, with d = l − ref: k1 = d, k2 = d²/2, k3 = exp(−d) + d − 1.

    Source: Liu et al. 2025 (Dr. GRPO); Schulman 2020 for the estimators.
    """
    loss_T = _surrogate(loss, t)
    if loss.beta == 0:
        return loss_T
    d_T = t.log_ratio_to("ref_logprobs")
    if d_T is None:
        raise InvalidRequest("loss_fn_inputs.ref_logprobs is missing; drgrpo needs it where beta > 0")
    match loss.kl_type:
        case "k1":
            kl_T = d_T
        case "k2":
            kl_T = d_T.square() / 2
        case "k3":
            d_T = d_T.clamp(-MAX_LOG_RATIO_K3, MAX_LOG_RATIO_K3)
            kl_T = (-d_T).exp() + d_T - 1
        case _:
            assert_never(loss.kl_type)
    return loss_T + loss.beta * kl_T


def _surrogate(loss: ClippedLosses, t: _Tokens) -> Tensor:
    """max(− r A, − clip(r, low, high) A), and at most − cap A where A < 0; no gradient where a bound holds r.

    Source: Schulman et al. 2017 (PPO); Ye et al. 2020 for the cap (dual clip).
    """
    r = _bounded_ratio(loss, t)
    # exp sees no ratio that a bound holds: where it overflows, its gradient would be 0 * inf
    free_T = torch.where(r.held_T, 0.0, r.log_ratio_T).exp()
    return -torch.where(r.held_T, r.bound_T, free_T) * t.advantages_T


@dataclass(frozen=True)
class _BoundedRatio:
    log_ratio_T: Tensor
    bound_T: Tensor  # what the ratio is where it is held
    held_T: Tensor


def _bounded_ratio(loss: ClippedLosses, t: _Tokens) -> _BoundedRatio:
    """The surrogate's min and max as bounds of r: only high matters where A > 0, only low and cap where A < 0."""
    log_ratio_T, cap = t.log_ratio_T, math.inf
    match loss:
        case Ppo():
            low, high = loss.clip_low_threshold, loss.clip_high_threshold
        case Gspo():
            low, high = loss.clip_low_threshold, loss.clip_high_threshold
            log_ratio_T = _sequence_log_ratio(t, t.x.arrays.get("sequence_ratio_mask"))
        case PolicyLoss():
            low, high = 1 - loss.eps_clip, 1 + loss.eps_clip_high
            cap = math.inf if loss.eps_clip_c is None else loss.eps_clip_c
        case DrGrpo():
            low, high = 1 - loss.clip_low, 1 + loss.clip_high
            if loss.ratio_type == "sequence":
                log_ratio_T = _sequence_log_ratio(t, None)
        case _:
            assert_never(loss)
    floor_T = torch.where(t.advantages_T > 0, 0.0, low)
    ceiling_T = torch.where(t.advantages_T < 0, cap, high)
    ratio_T = log_ratio_T.detach().exp()
    return _BoundedRatio(log_ratio_T, ratio_T.clamp(floor_T, ceiling_T), (ratio_T < floor_T) | (ratio_T > ceiling_T))


def _sequence_log_ratio(t: _Tokens, mask_T: Tensor | None) -> Tensor:
    """log s, s = exp(mean of l − q over the datum's tokens with mask ≠ 0), as l − sg(l) + sg(log s).

    Without a mask the tokens with an advantage are meant: clients send prompts as q = 0, A = 0.
    Source: Zheng et al. 2025 (GSPO), its token-level form.
    """
    in_ratio_T = t.x.valid_T & ((t.advantages_T if mask_T is None else mask_T) != 0)
    log_ratio_T = t.log_ratio_T.detach()
    datum_T = torch.repeat_interleave(torch.tensor(t.x.offsets).diff()).to(log_ratio_T.device)
    zeros_N = log_ratio_T.new_zeros(len(t.x.offsets) - 1)
    sum_N = zeros_N.index_add(0, datum_T, torch.where(in_ratio_T, log_ratio_T, 0.0))
    count_N = zeros_N.index_add(0, datum_T, in_ratio_T.to(log_ratio_T.dtype))
    mean_N = sum_N / count_N.clamp(min=1)
    return t.logprobs_T - t.logprobs_T.detach() + mean_N[datum_T]


def _tis_ratio(loss: PolicyLoss, t: _Tokens) -> Tensor | None:
    """exp(l − rollout_logprobs) before its truncation; None where TIS is off."""
    log_ratio_T = t.log_ratio_to("rollout_logprobs") if loss.use_tis else None
    return None if log_ratio_T is None else log_ratio_T.detach().exp()


def _icepopped(beta: float, t: _Tokens) -> Tensor:
    return (t.ratio_T < 1 / beta) | (t.ratio_T > beta)


def _counted(loss: AnyLoss, x: LossInputs) -> Tensor:
    counted_T = ((x.targets_TK != IGNORED_TARGET) & (x.weights_TK != 0)).any(dim=1)
    match loss:
        case CrossEntropy() | CausalLmLoss():
            return counted_T
        case ImportanceSampling() | Ppo() | Cispo() | Dro() | Gspo() | PolicyLoss() | DrGrpo():
            return counted_T & (x.arrays["advantages"] != 0)
        case _:
            assert_never(loss)


def _statistics(loss: RlLosses, t: _Tokens, counted_T: Tensor) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled, over the counted tokens; on-policy values if there are none."""

    def counted(values_T: Tensor, on_policy: float) -> Tensor:
        picked = values_T[counted_T].double()
        return picked if len(picked) else picked.new_tensor([on_policy])

    log_ratio = counted(t.log_ratio_T, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    values = _spread("ratio", ratio) | {
        "kl_sample_train_k3:mean": (ratio - log_ratio - 1).mean(),
        "entropy_sample:mean": -counted(t.sampling_T, 0.0).mean(),
    }
    match loss:
        case ImportanceSampling() | Dro():
            pass
        case Cispo():
            clipped_T = (t.ratio_T < loss.clip_low_threshold) | (t.ratio_T > loss.clip_high_threshold)
            values["clip_fraction:mean"] = counted(clipped_T, 0.0).mean()
        case Ppo() | Gspo():
            values["clip_fraction:mean"] = counted(_bounded_ratio(loss, t).held_T, 0.0).mean()
        case DrGrpo():
            values["pg_clipfrac:mean"] = counted(_bounded_ratio(loss, t).held_T, 0.0).mean()
        case PolicyLoss():
            values["pg_clipfrac:mean"] = counted(_bounded_ratio(loss, t).held_T, 0.0).mean()
            if loss.icepop_beta is not None:
                values["icepop_maskfrac:mean"] = counted(_icepopped(loss.icepop_beta, t), 0.0).mean()
            if (tis_ratio_T := _tis_ratio(loss, t)) is not None:
                tis_T = tis_ratio_T.clamp(loss.tis_clip_low, loss.tis_clip_high)
                values |= _spread("tis", counted(tis_T, 1.0))
                values["tis_clipfrac:mean"] = counted(tis_T != tis_ratio_T, 0.0).mean()
        case _:
            assert_never(loss)
    return values


def _spread(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}_mean:mean": values.mean(), f"{name}_min:min": values.min(), f"{name}_max:max": values.max()}
