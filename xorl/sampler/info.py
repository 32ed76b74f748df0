"""States what is served: the answers of /model_info, /server_info and /v1/models."""

from collections.abc import Iterable

import msgspec

from xorl.sampler.adapters import MAX_LORA_RANK
from xorl.sampler.engine import MAX_RUNNING_ROWS

VERSION = "xorl-0.1.0"


class ModelInfo(msgspec.Struct, frozen=True):
    model_path: str
    served_model_name: str
    tokenizer_path: str
    weight_version: str
    model_type: str
    architectures: list[str]
    is_generation: bool = True
    load_format: str = "auto"


class ServerInfo(msgspec.Struct, frozen=True):
    model_path: str
    served_model_name: str
    tokenizer_path: str
    weight_version: str
    dtype: str
    device: str
    context_length: int
    version: str = VERSION
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    dequantizes: bool = True
    enable_lora: bool = True
    max_lora_rank: int = MAX_LORA_RANK
    max_running_requests: int = MAX_RUNNING_ROWS
    internal_states: list[dict[str, int]] = []


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    root: str
    max_model_len: int
    parent: str | None = None
    object: str = "model"
    owned_by: str = "xorl"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"


class ModelFacts(msgspec.Struct, frozen=True):
    """What never changes while the server runs."""

    path: str
    model_type: str
    architectures: list[str]
    context_tokens: int
    dtype: str
    device: str

    def model_info(self, weight_version: str) -> ModelInfo:
        return ModelInfo(self.path, self.path, self.path, weight_version, self.model_type, self.architectures)

    def server_info(self, weight_version: str) -> ServerInfo:
        path = self.path
        return ServerInfo(path, path, path, weight_version, self.dtype, self.device, self.context_tokens)

    def models(self, adapters: Iterable[tuple[str, str]]) -> ModelList:
        """The base model and the (name, path) of each adapter."""
        base = ModelCard(self.path, self.path, self.context_tokens)
        return ModelList([base] + [ModelCard(name, path, self.context_tokens, self.path) for name, path in adapters])
