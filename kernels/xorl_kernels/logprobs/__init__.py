"""Log-probabilities of targets from hidden states, without the logits in memory.

T: tokens; K: targets a token; J: most likely tokens asked for; H: hidden size; V: vocabulary; R: rank of the tail.
"""

from torch import Tensor

from xorl_kernels.dispatch import use_triton
from xorl_kernels.logprobs import function, reference
from xorl_kernels.logprobs.function import Ask, Entropy, Scores, Steps, TopK

__all__ = ["Scores", "TopK", "logprobs", "scores"]


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

    With a frozen head, no tail and one target a token, forward and backward are 4 T H V operations; otherwise 6 T H V,
    and 2 T H V more for a weight with a gradient.

    Args:
        hidden_TH: bfloat16 or float32.
        weight_VH: the unembedding, of hidden's dtype.
        targets_TK: int64, −100 is ignored: 0 and no gradient. A token without any target costs nothing. On the CPU
            they spare a CUDA synchronisation, which finding these tokens needs otherwise.
        chunk_tokens: tokens whose logits exist at one time, in float32; their gradient takes the same memory. 1024
            tokens of Qwen3's V = 151,936 are 622 MB. The frozen head keeps a row of H for each token besides: 268 MB
            for 32k tokens of H = 4096 in bfloat16.
        tail: xa_TR and b_VR of hidden's dtype, a low-rank addition to the logits (LoRA on the unembedding, its scale
            already in xa).

    Returns:
        [T, K] float32, differentiable once in hidden, weight and both parts of the tail; the same to the bit
        whether or not a gradient is wanted. A target outside the vocabulary is refused on the CPU and NaN on CUDA.
    """
    ask = Ask(_steps(hidden_TH), temperature, chunk_tokens)
    return function.scores(hidden_TH, weight_VH, targets_TK, tail, ask).logprobs_TK


def scores(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_TK: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    tail: tuple[Tensor, Tensor] | None = None,
    entropy: Entropy | None = None,
    top_k: int = 0,
) -> Scores:
    """What `logprobs` gives, and from the same logits the entropy and the most likely tokens.

    Args:
        entropy: of softmax(z), in nats. "value" is free of charge and has no gradient; "differentiable" has one, at
            6 T H V operations.
        top_k: how many of the most likely tokens, in falling order; which of equals come first, or at all, is not said.
    """
    ask = Ask(_steps(hidden_TH), temperature, chunk_tokens, entropy, top_k)
    return function.scores(hidden_TH, weight_VH, targets_TK, tail, ask)


def _steps(hidden_TH: Tensor) -> Steps:
    if use_triton(hidden_TH):
        from xorl_kernels.logprobs import kernel  # Triton is not installed everywhere

        return kernel
    return reference
