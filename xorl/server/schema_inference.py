"""Gives the requests and responses about inference endpoints their shape on the wire."""

from typing import Annotated, Any

from pydantic import Field

from xorl.server.schema import ModelId, ModelInput, Rate, Seed, SeqId, SessionId, Tensor, Wire, alias
from xorl.types import CacheMode, PauseMode

Port = Annotated[int, Field(ge=1, le=65535)]
Quantization = dict[str, str | list[int | str] | None]


class EndpointAddress(Wire):
    host: str = Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9._:-]+$")
    port: Port


class SyncTransport(Wire):
    master_address: str = ""
    master_port: int = Field(0, ge=0, le=65535)
    group_name: str = Field("weight_sync_group", min_length=1, max_length=128)
    buffer_size_mb: int = Field(1024, ge=1, le=65536)


class AddEndpointRequest(EndpointAddress, SyncTransport):
    worker_port: Port | None = None
    world_size: int = Field(1, ge=1, le=1024)
    pool: str = "default"
    receiver_kv_cache_dtype: str | None = None
    sync_weights: bool = False


class EndpointRow(Wire):
    host: str
    port: int
    worker_port: int
    world_size: int
    healthy: bool
    stale: bool
    pool: str
    receiver_kv_cache_dtype: str | None = None
    server_info: dict[str, Any] | None = None


class AddEndpointResponse(Wire):
    success: bool
    message: str
    endpoint: EndpointRow | None = None
    weights_synced: bool = False
    sync_message: str | None = None


class RemoveEndpointResponse(Wire):
    success: bool
    message: str


class EndpointRows(Wire):
    endpoints: list[EndpointRow]
    count: int


class SyncRequest(SyncTransport):
    model_id: ModelId | None = Field(None, validation_alias=alias("model_id", "session_id"))
    flush_cache: bool = False
    cache_invalidation_mode: CacheMode = "auto"
    pause_mode: PauseMode = "retract"
    weight_version: str | None = None
    quantization: Quantization | None = None
    pools: list[str] | None = None


class EndpointSynced(Wire):
    host: str
    port: int
    success: bool
    message: str


class SyncResponse(Wire):
    success: bool
    message: str
    transfer_time: float = 0.0
    total_bytes: int = 0
    num_parameters: int = 0
    num_buckets: int = 0
    endpoints_synced: list[EndpointSynced] = Field(default_factory=list[EndpointSynced])


class QuantizationRequest(Wire):
    quantization: Quantization | None


class QuantizationResponse(Wire):
    quantization: Quantization | None
    message: str


class SamplingSessionRequest(Wire):
    """tinker's form has session_id and sampling_session_seq_id."""

    model_id: ModelId | None = None
    session_id: SessionId | None = None
    sampling_session_seq_id: SeqId | None = None
    model_path: str | None = None
    base_model: str | None = None


class SamplingParams(Wire):
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Rate = 1.0
    top_k: int = Field(-1, ge=-1, lt=2**31)
    top_p: float = Field(1.0, gt=0, le=1)


class SampleRequest(Wire):
    num_samples: int = Field(1, ge=1, le=4096)
    prompt: ModelInput
    sampling_params: SamplingParams = SamplingParams()  # pyright: ignore[reportCallIssue]
    sampling_session_id: str | None = None
    seq_id: SeqId | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    target_prompt_logprobs: Tensor | None = None


class SampleRef(Wire):
    request_id: str
    sample_sequence_ids: list[str]
