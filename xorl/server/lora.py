"""Reads what create_model asks for: an adapter's shape and the optimizer's defaults."""

from collections.abc import Iterable
from pathlib import PurePath

import msgspec

from xorl.config import EngineConfig
from xorl.engine.commands import ModelInfo
from xorl.errors import InvalidRequest
from xorl.server.schema import LoraConfig, OptimizerConfig
from xorl.types import LORA_PROJECTIONS, UNEMBEDDING, AdamParams, LoraSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
OPTIMIZERS = ("adam", "adamw")


def check_base_model(name: str, info: ModelInfo) -> None:
    served = [*info.names, info.path]
    if name not in served and name not in {PurePath(other).name for other in served}:
        raise InvalidRequest(f"base_model: this server has {info.names[0]}, not {name}")


def lora_spec(config: LoraConfig, limits: EngineConfig) -> tuple[LoraSpec, frozenset[str]]:
    """The adapter asked for, and which fields of it were asked for.

    Raises:
        InvalidRequest: naming the field of lora_config.
    """
    asked: dict[str, int | float | tuple[str, ...]] = {}
    if config.dropout:
        raise InvalidRequest(f"lora_config.dropout: only 0 is supported, got {config.dropout:g}")
    if config.rank is not None:
        if not 1 <= config.rank <= limits.max_lora_rank:
            raise InvalidRequest(f"lora_config.rank: {config.rank} is not in 1..{limits.max_lora_rank}")
        asked["rank"] = config.rank
    if config.alpha is not None:
        if config.alpha <= 0:
            raise InvalidRequest(f"lora_config.alpha: {config.alpha:g} is not above 0")
        asked["alpha"] = config.alpha
    if config.seed is not None:
        asked["seed"] = config.seed
    targets = _targets(config)
    if targets is not None:
        asked["target_modules"] = targets
    return msgspec.structs.replace(LoraSpec(), **asked), frozenset(asked)


def _targets(config: LoraConfig) -> tuple[str, ...] | None:
    if config.target_modules is not None:
        listed = config.target_modules
        names = [listed] if isinstance(listed, str) else listed
        return _in_order(LORA_PROJECTIONS if listed == "all-linear" else names)
    attention, mlp, unembedding = config.train_attn, config.train_mlp, config.train_unembed
    if attention is None and mlp is None and unembedding is None:
        return None
    parts = ((attention, ATTENTION), (mlp, MLP), (unembedding, (UNEMBEDDING,)))
    names = [name for wanted, part in parts if wanted is not False for name in part]
    if not names:
        raise InvalidRequest("lora_config: at least one of train_attn, train_mlp and train_unembed must be true")
    return _in_order(names)


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    """One spelling for each set of targets."""
    known = (*LORA_PROJECTIONS, UNEMBEDDING)
    wanted = set(names)
    if unknown := sorted(wanted.difference(known)):
        raise InvalidRequest(f"lora_config.target_modules: {unknown[0]!r} is not one of {', '.join(known)}")
    if not wanted:
        raise InvalidRequest("lora_config.target_modules: empty")
    return tuple(name for name in known if name in wanted)


def adam_defaults(config: OptimizerConfig | None) -> tuple[AdamParams, frozenset[str]]:
    """The session's defaults for optim_step, and which of them were asked for."""
    if config is None:
        return AdamParams(), frozenset()
    if config.type is not None and config.type.lower() not in OPTIMIZERS:
        raise InvalidRequest(f"optimizer_config.type: {config.type!r} is not supported, only adamw")
    if config.optimizer_dtype not in (None, "float32", "fp32"):
        raise InvalidRequest(
            f"optimizer_config.optimizer_dtype: {config.optimizer_dtype!r} is not supported, only float32"
        )
    asked = {
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "eps": config.eps,
        "beta1": config.betas[0] if config.betas else None,
        "beta2": config.betas[1] if config.betas else None,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return msgspec.structs.replace(AdamParams(), **given), frozenset(given)
