"""Spells SGLang's JSON: what requests may say, what answers hold. Unknown fields of a request are dropped."""

import secrets
from typing import Any, Literal

import msgspec
import torch

from xorl.errors import InvalidRequest
from xorl.sampler.rows import FinishReason, Row, StopRule, TopTokens, WeightSpan
from xorl.sampler.sampling import Sampling
from xorl.sampler.text import Text
from xorl.sampler.weights import TensorSpec
from xorl.types import PauseMode

DEFAULT_GROUP = "weight_update_group"

LogprobEntry = tuple[float | None, int, str | None]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Those that only appear in `check` are known to SGLang, not implemented here, and refused unless at rest."""

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    n: int = 1
    sampling_seed: int | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_regex: str | list[str] = []
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    logit_bias: dict[str, float] = {}
    custom_params: dict[str, Any] = {}

    def check(self, place: str) -> None:
        for field, allowed, rule in (
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 0, "at least 0"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("n", self.n >= 1, "at least 1"),
            ("frequency_penalty", self.frequency_penalty == 0, "0; penalties are not implemented"),
            ("presence_penalty", self.presence_penalty == 0, "0; penalties are not implemented"),
            ("repetition_penalty", self.repetition_penalty == 1, "1; penalties are not implemented"),
            ("stop_regex", not self.stop_regex, "absent; it is not implemented"),
            ("json_schema", not self.json_schema, "absent; grammars are not implemented"),
            ("regex", not self.regex, "absent; grammars are not implemented"),
            ("ebnf", not self.ebnf, "absent; grammars are not implemented"),
            ("structural_tag", not self.structural_tag, "absent; grammars are not implemented"),
            ("logit_bias", not self.logit_bias, "absent; it is not implemented"),
            ("custom_params", not self.custom_params, "absent; it is not implemented"),
        ):
            if not allowed:
                raise InvalidRequest(f"{place}.{field}: got {getattr(self, field)!r}, must be {rule}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p)

    @property
    def any_seed(self) -> int:
        given = self.sampling_seed if self.sampling_seed is not None else self.seed
        return secrets.randbits(63) if given is None else given

    def stop_rule(self, eos_token_ids: frozenset[int], room: int) -> StopRule:
        """`room`: tokens left in the context after the prompt."""
        return StopRule(
            max_new_tokens=room if self.max_new_tokens is None else self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            token_ids=frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else eos_token_ids),
            strings=tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop)),
            skip_special_tokens=self.skip_special_tokens,
        )


class GenerateRequest(msgspec.Struct, frozen=True):
    """A field that is a list has one entry for each prompt of a batch."""

    input_ids: list[int | list[int]] | None = None
    text: str | list[str] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = False
    logprob_start_len: int | list[int] | None = -1
    top_logprobs_num: int | list[int] | None = 0
    return_text_in_logprobs: bool | None = False
    lora_path: str | list[str | None] | None = None
    stream: bool | None = False
    token_ids_logprob: list[Any] | None = None
    return_hidden_states: bool | list[bool] | None = False
    input_embeds: list[Any] | None = None
    image_data: Any = None


class MetaInfo(msgspec.Struct):
    id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    weight_versions: list[WeightSpan]
    e2e_latency: float
    input_token_logprobs: list[LogprobEntry] | msgspec.UnsetType = msgspec.UNSET
    output_token_logprobs: list[LogprobEntry] | msgspec.UnsetType = msgspec.UNSET
    input_top_logprobs: list[list[LogprobEntry] | None] | msgspec.UnsetType = msgspec.UNSET
    output_top_logprobs: list[list[LogprobEntry] | None] | msgspec.UnsetType = msgspec.UNSET


class GenerateAnswer(msgspec.Struct):
    text: str
    output_ids: list[int]
    meta_info: MetaInfo


def add_logprobs(meta: MetaInfo, row: Row, text: Text | None) -> None:
    """Fill in the logprob fields; `text` only where each token's text was asked for."""

    def entry(logprob: float | None, token: int) -> LogprobEntry:
        return logprob, token, None if text is None else text.decode([token], skip_special_tokens=False)

    def tops(entries: list[TopTokens]) -> list[list[LogprobEntry] | None]:
        return [[entry(*pair) for pair in zip(top.logprobs, top.tokens, strict=True)] for top in entries]

    meta.output_token_logprobs = list(map(entry, row.logprobs, row.output))
    scored = row.prompt_logprobs
    meta.input_token_logprobs = []
    if scored is not None:
        meta.input_token_logprobs = list(map(entry, [None, *scored.logprobs], row.prompt.tokens[scored.start :]))
    if row.prompt.num_top:
        meta.output_top_logprobs = tops(row.top)
        meta.input_top_logprobs = [] if scored is None else [None, *tops(scored.top)]


class InitGroupRequest(msgspec.Struct, frozen=True):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = DEFAULT_GROUP
    backend: str = "nccl"


class DestroyGroupRequest(msgspec.Struct, frozen=True):
    group_name: str = DEFAULT_GROUP


class UpdateRequest(msgspec.Struct, frozen=True):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = DEFAULT_GROUP
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: str | None = None

    def specs(self) -> list[TensorSpec]:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise InvalidRequest("names, dtypes and shapes must be of one length")
        return [
            TensorSpec(name, torch_dtype(name, dtype), tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True)
        ]


class UpdateFromDiskRequest(msgspec.Struct, frozen=True):
    model_path: str
    abort_all_requests: bool = False
    weight_version: str | None = None
    flush_cache: bool = True


class VersionRequest(msgspec.Struct, frozen=True):
    new_version: str
    abort_all_requests: bool = True


class PauseRequest(msgspec.Struct, frozen=True):
    mode: PauseMode = "abort"


class AbortRequest(msgspec.Struct, frozen=True):
    rid: str = ""
    abort_all: bool = False


class LoadLoraRequest(msgspec.Struct, frozen=True):
    lora_name: str
    lora_path: str
    pinned: bool = False


class UnloadLoraRequest(msgspec.Struct, frozen=True):
    lora_name: str


class CheckerRequest(msgspec.Struct, frozen=True):
    action: Literal["checksum"] = "checksum"


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise InvalidRequest(f"{name}: dtype {dtype!r} is not one of torch's, such as bfloat16 or float32")
    return found
