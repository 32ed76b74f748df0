"""The plain PyTorch twin of the log-probabilities kernels; also the CPU path.

C: tokens of a chunk; K: targets a token; V: vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Scored(NamedTuple):
    """What is known of a chunk from its logits z, after the temperature. All float32.

    max_C1 and sum_C1 = Σ_v exp(z_v − max) are kept apart: their log-sum-exp would lose digits of large logits.
    """

    logprobs_CK: Tensor
    max_C1: Tensor
    sum_C1: Tensor
    entropy_C1: Tensor | None


def score(logits_CV: Tensor, targets_CK: Tensor, temperature: float, *, entropy: bool) -> Scored:
    """log p of the targets (0 where ignored) and the entropy −Σ p log p.

    The memory of the logits then holds exp(z − max): a second [C, V] would cost more time than the arithmetic.
    """
    z_CV = logits_CV if temperature == 1.0 else logits_CV.div_(temperature)
    ignored_CK = targets_CK == IGNORED
    target_CK = z_CV.gather(1, targets_CK.masked_fill(ignored_CK, 0))
    max_C1 = z_CV.amax(dim=1, keepdim=True)
    exp_CV = z_CV.sub_(max_C1).exp_()
    sum_C1 = exp_CV.sum(dim=1, keepdim=True)
    logprobs_CK = (target_CK - max_C1 - sum_C1.log()).masked_fill_(ignored_CK, 0.0)
    entropy_C1 = None
    if entropy:
        entropy_C1 = sum_C1.log() + torch.special.entr(exp_CV).sum(dim=1, keepdim=True) / sum_C1
    return Scored(logprobs_CK, max_C1, sum_C1, entropy_C1)


def dlogits(
    logits_CV: Tensor,
    targets_CK: Tensor,
    scored: Scored,
    dlogprobs_CK: Tensor,
    dentropy_C1: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """(Σ_k g_k (onehot(target_k) − p) − g_entropy p (log p + entropy)) / temperature, in the memory of the logits.

    Args:
        logits_CV: as `score` left them.
        dlogprobs_CK: g, 0 where a target is ignored.
        dtype: of the result.
    """
    exp_CV, sum_C1 = logits_CV, scored.sum_C1
    factor_C1, bend_CV = -dlogprobs_CK.sum(dim=1, keepdim=True), None
    if dentropy_C1 is not None and scored.entropy_C1 is not None:
        factor_C1 = factor_C1 + dentropy_C1 * (sum_C1.log() - scored.entropy_C1)
        bend_CV = torch.special.entr(exp_CV).mul_(dentropy_C1 / sum_C1 / temperature)
    dlogits_CV = exp_CV.mul_(factor_C1 / sum_C1 / temperature)
    if bend_CV is not None:
        dlogits_CV += bend_CV
    targets_CK = targets_CK.masked_fill(targets_CK == IGNORED, 0)
    return dlogits_CV.scatter_add_(1, targets_CK, dlogprobs_CK / temperature).to(dtype)
