"""Lists what is trained as full tensors under their Hugging Face names, each with the adapter to merge into it."""

from torch import Tensor
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from xorl.engine.adapters import SIDES, TrainedModel
from xorl.engine.model import BaseModel
from xorl.engine.parallel import whole
from xorl.errors import InvalidRequest
from xorl.sync.formats import Weight
from xorl.types import UNEMBEDDING
from xorl_kernels.fp8_quantize import Lora


def merged_tensors(model: TrainedModel, base: BaseModel) -> list[Weight]:
    """Every weight of the model, in the order of the network; W + scale · B A where an adapter acts.

    Tied embeddings go once, as the embedding. The weights of a sharded network are for the first rank alone.

    Raises:
        InvalidRequest: the model's checkpoints have other names than transformers gives it, or the adapter trains the
            unembedding of a model whose embeddings are tied, so that merged weights have no place for it.
    """
    if UNEMBEDDING in (model.spec.target_modules if model.spec else ()) and base.tied:
        raise InvalidRequest(
            "target_modules: lm_head is trained but the base model ties it to the embedding, so merged weights cannot "
            "hold it; sync the adapter itself (create_sampling_session) or train without lm_head"
        )
    _refuse_other_names(base.network.config)
    return [
        Weight(name, tensor, base.dtype, _adapter(name, model), base.scales(name), base.device)
        for name, tensor in whole_parameters(base).items()
    ]


def whole_parameters(base: BaseModel) -> dict[str, Tensor]:
    """The network's own weights; those of one that is sharded in CPU memory of the first rank, empty on the others.

    All ranks must ask.
    """
    parameters: dict[str, Tensor] = dict(base.network.named_parameters())
    if not base.sharded:
        return parameters
    gathered = {}
    for name, parameter in parameters.items():
        full = whole(parameter)
        if base.ranks.is_first:
            gathered[name] = full.cpu()
    return gathered


def _adapter(name: str, model: TrainedModel) -> Lora | None:
    layer = name.removesuffix(".weight")
    if model.spec is None or f"{layer}.{SIDES[0]}" not in model.parameters:
        return None
    return Lora(*model.pair(layer), model.spec.scale)


def _refuse_other_names(config: PretrainedConfig) -> None:
    """Servers read the names of checkpoints. Of those that transformers changes, we undo the stacking of experts."""
    changes = get_checkpoint_conversion_mapping(config.model_type) or []
    undone = get_checkpoint_conversion_mapping("qwen2_moe") or []
    if changes and [each.source_patterns for each in changes] != [each.source_patterns for each in undone]:
        raise InvalidRequest(
            f"model {config.model_type}: its weights have other names in checkpoints; sync cannot undo that"
        )
