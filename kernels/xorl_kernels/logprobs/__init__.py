"""Log-probabilities of targets from hidden states, without the logits in memory.

T: tokens; K: targets a token; H: hidden size; V: vocabulary; R: rank of the tail.
"""

from torch import Tensor

from xorl_kernels.logprobs import reference

__all__ = ["logprobs"]


def logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_TK: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    tail: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """l_tk = z_t[target_tk] − log Σ_v exp z_tv, with z = (h Wᵀ + xa bᵀ) / temperature.

    Args:
        hidden_TH: bfloat16 or float32.
        weight_VH: the unembedding, of hidden's dtype.
        targets_TK: int64, −100 is ignored: 0 and no gradient. A token without any target costs nothing. On the CPU
            they spare a CUDA synchronisation, which finding these tokens needs otherwise.
        chunk_tokens: tokens whose logits exist at one time, in float32.
        tail: xa_TR and b_VR, a low-rank addition to the logits (LoRA on the unembedding, its scale already in xa).

    Returns:
        [T, K] float32, differentiable once in hidden, weight and both parts of the tail; the same to the bit
        whether or not a gradient is wanted.
    """
    return reference.logprobs(
        hidden_TH, weight_VH, targets_TK, temperature=temperature, chunk_tokens=chunk_tokens, tail=tail
    )
