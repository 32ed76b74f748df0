"""Values that the control plane and the engine share."""

from typing import ClassVar, Literal

import msgspec

IGNORED_TARGET = -100
"""A target with this id has no loss and no gradient."""

LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder block, by the name PEFT and SGLang know them under."""

UNEMBEDDING = "lm_head"

CacheMode = Literal["auto", "flush", "none"]
PauseMode = Literal["retract", "abort", "in_place"]


class LoraSpec(msgspec.Struct, frozen=True):
    """The shape and the start of one adapter."""

    rank: int = 32
    alpha: float = 32.0
    target_modules: tuple[str, ...] = LORA_PROJECTIONS
    seed: int | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdamParams(msgspec.Struct, frozen=True):
    """One AdamW step. `grad_clip_norm` 0 does not clip."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Loss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="loss_fn"):
    """A loss by its wire name (the tag), with its options.

    Attributes:
        required: names of the float32 loss_fn_inputs it cannot do without.
        optional: names of those it also understands.
    """

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("weights",)


class CrossEntropy(Loss, frozen=True, tag="cross_entropy"):
    return_per_token: bool = True


class CausalLmLoss(Loss, frozen=True, tag="causallm_loss"):
    return_per_token: bool = True


class RlLoss(Loss, frozen=True):
    required: ClassVar[tuple[str, ...]] = ("logprobs", "advantages")

    compute_kl_stats: bool = False


class ImportanceSampling(RlLoss, frozen=True, tag="importance_sampling"):
    pass


class Ppo(RlLoss, frozen=True, tag="ppo"):
    """The thresholds are bounds of the ratio itself, not distances from 1."""

    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2


class Cispo(RlLoss, frozen=True, tag="cispo"):
    clip_low_threshold: float = 0.0
    clip_high_threshold: float = 4.0


class Dro(RlLoss, frozen=True, tag="dro"):
    beta: float = 0.05


class Gspo(RlLoss, frozen=True, tag="gspo"):
    optional: ClassVar[tuple[str, ...]] = ("weights", "sequence_ratio_mask")

    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2


class PolicyLoss(RlLoss, frozen=True, tag="policy_loss"):
    optional: ClassVar[tuple[str, ...]] = ("weights", "rollout_logprobs")

    eps_clip: float = 0.2
    eps_clip_high: float = 0.2
    eps_clip_c: float | None = None
    use_tis: bool = False
    tis_clip_low: float = 0.1
    tis_clip_high: float = 2.0
    icepop_beta: float | None = None
    logprob_temperature: float = 1.0


class DrGrpo(RlLoss, frozen=True, tag="drgrpo"):
    optional: ClassVar[tuple[str, ...]] = ("weights", "ref_logprobs")

    clip_low: float = 0.2
    clip_high: float = 0.28
    beta: float = 0.0
    ratio_type: Literal["token", "sequence"] = "token"
    kl_type: Literal["k1", "k2", "k3"] = "k3"


LOSSES: tuple[type[Loss], ...] = (
    CrossEntropy,
    CausalLmLoss,
    ImportanceSampling,
    Ppo,
    Cispo,
    Dro,
    Gspo,
    PolicyLoss,
    DrGrpo,
)
AnyLoss = CrossEntropy | CausalLmLoss | ImportanceSampling | Ppo | Cispo | Dro | Gspo | PolicyLoss | DrGrpo
LossFnName = Literal[
    "cross_entropy",
    "causallm_loss",
    "importance_sampling",
    "ppo",
    "cispo",
    "dro",
    "gspo",
    "policy_loss",
    "drgrpo",
]

MANIFEST = "manifest.json"
"""Present in a checkpoint's directory, which without it is not a checkpoint."""


class Manifest(msgspec.Struct, frozen=True):
    """What a checkpoint holds. `files` maps each other file to the SHA-256 of its bytes, in hex."""

    kind: Literal["training", "sampler"]
    model_id: str
    name: str
    base_model: str
    time: str  # ISO 8601, UTC
    step: int
    lora: LoraSpec | None  # None: full weights
    size_bytes: int
    files: dict[str, str]
    user_metadata: dict[str, str] | None = None
    format: int = 1
