"""Holds every setting: flags, XORL_* variables and a YAML file give the same names, flags win, then variables.

A field `port` of any section is `--port`, `XORL_PORT` and, in YAML, `port` under its section's name.
"""

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    model: str = Field(description="Hugging Face name or local folder of the base model")
    full: bool = Field(False, description="train full weights, as the one model `default`; else LoRA adapters")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on CUDA, else float32")
    fp8: bool = Field(False, description="hold the frozen linear layers as FP8 blocks of 128 x 128: half the memory")

    @model_validator(mode="after")
    def _refuse_trained_codes(self) -> Self:
        if self.full and self.fp8:
            raise ValueError("fp8 is for a frozen base; with full all weights are trained")
        return self


class HttpConfig(Section):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(5555, ge=1, le=65535, description="port to listen on")
    api_key: str = Field("", description="clients must send it (Bearer or X-API-Key); empty asks for none")
    allow_remote_without_key: bool = Field(False, description="allow an address beyond loopback without api_key")
    retrieve_hold_s: float = Field(20.0, gt=0, le=40, description="how long retrieve_future waits for a result")
    future_ttl_s: float = Field(3600.0, gt=0, description="how long a finished result can be retrieved")
    session_idle_s: float = Field(7200.0, gt=0, description="idle time after which a session is reported inactive")
    max_body_mb: int = Field(512, ge=64, description="largest request body")
    max_queued: int = Field(10_000, gt=0, description="commands waiting in the engine before 429")
    inference_hosts: str = Field(
        "127.0.0.1,localhost,::1", description="hosts allowed as inference endpoints; * for any"
    )


class EngineConfig(Section):
    gpus: int = Field(1, ge=1, description="engine processes, one a GPU; on the CPU they meet over gloo")
    shard: Literal["auto", "always", "never"] = Field(
        "auto",
        description="split the layers over the GPUs; auto: if they do not fit on each; one GPU has nothing to split",
    )
    output_dir: Path = Field(Path("xorl-output"), description="checkpoints and the run database")
    max_batch_tokens: int = Field(8192, gt=0, description="tokens packed into one forward pass")
    logprob_chunk_tokens: int = Field(1024, gt=0, description="rows of logits that exist at a time")
    max_resident_adapters: int = Field(
        64, gt=0, description="adapters kept on the device; the others wait in CPU memory or on disk"
    )
    model_weights: str = Field(
        "", description="shares of the engine as model_id=weight, comma-separated, * for any characters; others have 1"
    )
    max_lora_rank: int = Field(256, gt=0, description="largest rank a client may ask for")
    activation_checkpointing: bool = Field(False, description="recompute activations in backward")
    offload_activations: bool = Field(False, description="keep activations in CPU memory until backward")
    torch_threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 lets torch choose")
    trace_path: str = Field("", description="Chrome trace of the engine's stages, written when it ends")

    @field_validator("model_weights")
    @classmethod
    def _refuse_bad_weights(cls, text: str) -> str:
        _parse_weights(text)
        return text

    def weight_of(self, model_id: str) -> float:
        """The share of a model, by the first pattern of `model_weights` that fits."""
        weights = _parse_weights(self.model_weights)
        return next((weight for pattern, weight in weights if fnmatchcase(model_id, pattern)), 1.0)


class SyncConfig(Section):
    sync_timeout_s: float = Field(120.0, gt=0, description="longest wait for one answer of an inference endpoint")
    sync_verify: bool = Field(False, description="after a sync, compare checksums of what was sent and is served")
    inference_api_key: str = Field("", description="sent to inference endpoints that were added without an api_key")
    max_sampler_adapters: int = Field(
        32, gt=0, description="adapters kept loaded on the inference endpoints for each model"
    )


class Config(Section):
    """All settings, by owner."""

    base: ModelConfig
    http: HttpConfig = HttpConfig()  # pyright: ignore[reportCallIssue]
    engine: EngineConfig = EngineConfig()  # pyright: ignore[reportCallIssue]
    sync: SyncConfig = SyncConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _refuse_open_door(self) -> Self:
        if not (self.http.api_key or self.http.allow_remote_without_key or is_loopback(self.http.host)):
            raise ValueError(
                f"host {self.http.host} is reachable from other machines: "
                "set api_key, or allow_remote_without_key to serve anyone"
            )
        return self


def _parse_weights(text: str) -> list[tuple[str, float]]:
    weights = []
    for part in filter(None, text.split(",")):
        pattern, _, weight = part.rpartition("=")
        if not pattern or not re.fullmatch(r"\d*\.?\d+", weight) or not float(weight):
            raise ValueError(f"{part!r} is not model_id=weight with a weight above 0")
        weights.append((pattern, float(weight)))
    return weights


class ConfigError(Exception):
    """A setting that cannot be used; the text names it."""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings() -> Iterator[tuple[str, str, FieldInfo]]:
    """(section, name, field) of every setting; names are unique over all sections."""
    for section, outer in Config.model_fields.items():
        kind = outer.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Section)
        for name, field in kind.model_fields.items():
            yield section, name, field


def load(flags: Mapping[str, Any], config_file: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Merge YAML, environment and flags (None: not given) into one Config.

    Raises:
        ConfigError: naming the setting and where it came from.
    """
    tree = _read_yaml(config_file) if config_file else {}
    sources = {section + "." + name: str(config_file) for section, values in tree.items() for name in values}
    for section, name, _ in settings():
        variable = f"XORL_{name.upper()}"
        flag = f"--{name.replace('_', '-')}"
        for source, value in ((variable, environ.get(variable)), (flag, flags.get(name))):
            if value is not None:
                tree.setdefault(section, {})[name] = value
                sources[f"{section}.{name}"] = source
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(line, sources) for line in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    sections = {name: values or {} for name, values in tree.items()} if isinstance(tree, dict) else None
    if sections is None or not all(isinstance(n, str) and isinstance(v, dict) for n, v in sections.items()):
        raise ConfigError(f"{path}: expected sections ({', '.join(Config.model_fields)}) of settings")
    return sections


def _explain(line: Any, sources: Mapping[str, str]) -> str:
    place = ".".join(str(part) for part in line["loc"])
    message = line["msg"].removeprefix("Value error, ")
    if line["type"] == "missing":
        return "model is not set: give --model or XORL_MODEL"
    if line["type"] == "extra_forbidden":
        return f"{place}: there is no such setting"
    return f"{place} ({sources.get(place, 'default')}): {message}" if place else message
