"""Gives every request and response of the API its shape on the wire.

Unknown keys are dropped. The long lists of forward and forward_backward come as arrays; `datums` checks the numbers.
"""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MODEL_ID_PATTERN = r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,127}(:train:[0-9]{1,9})?$"

ModelId = Annotated[str, Field(pattern=MODEL_ID_PATTERN)]
SessionId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,127}$")]
SeqId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TtlSeconds = Annotated[int, Field(gt=0, le=10 * 366 * 24 * 3600)]


def _listed(value: object) -> list[Any] | np.ndarray:
    if isinstance(value, list | np.ndarray):
        return value
    raise PydanticCustomError("list_type", "Input should be a valid list")


Numbers = Annotated[
    list[Any] | np.ndarray,
    PlainValidator(_listed),
    WithJsonSchema({"type": "array", "items": {"type": "number"}}),
]


class Wire(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=(), allow_inf_nan=False, populate_by_name=True)


def alias(name: str, *others: str) -> AliasChoices:
    return AliasChoices(name, *others)


class ModelRequest(Wire):
    """A call that names a model."""

    model_id: ModelId = Field("default", validation_alias=alias("model_id", "session_id"))


class SequencedRequest(ModelRequest):
    seq_id: SeqId | None = None


class FutureRef(Wire):
    request_id: str
    model_id: str


# Training


class Tensor(Wire):
    data: Numbers
    dtype: Literal["float32", "int64", "int32"] | None = None
    shape: list[int] | None = None


TensorLike = Tensor | Numbers


class Chunk(Wire):
    type: str = "encoded_text"
    tokens: TensorLike | None = None


class ModelInput(Wire):
    input_ids: TensorLike | None = None
    chunks: list[Chunk] | None = None


class Datum(Wire):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorLike | None] = {}


LossOptions = dict[str, bool | float | str | None]


class Input(Wire):
    data: list[Datum]
    loss_fn: str = "causallm_loss"
    loss_fn_params: LossOptions | None = Field(None, validation_alias=alias("loss_fn_params", "loss_fn_config"))
    routed_experts: list[Any] | None = None
    routed_expert_logits: list[Any] | None = None


class ForwardRequest(SequencedRequest):
    forward_input: Input


class ForwardBackwardRequest(SequencedRequest):
    forward_backward_input: Input


Rate = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(ge=1e-30)]  # less is 0 in float32, and a parameter without gradient becomes 0 / 0


class AdamParamsWire(Wire):
    """null means: as the session or the server has it."""

    type: str | None = None
    learning_rate: Rate | None = None
    beta1: Decay | None = None
    beta2: Decay | None = None
    eps: Epsilon | None = None
    weight_decay: Rate | None = None
    grad_clip_norm: Rate | None = None


class OptimStepRequest(SequencedRequest):
    adam_params: AdamParamsWire | None = Field(None, validation_alias=alias("adam_params", "optimizer_params"))
    learning_rate: Rate | None = Field(None, validation_alias=alias("learning_rate", "lr"))
    gradient_clip: Rate | None = None


class RetrieveFutureRequest(Wire):
    request_id: str


# Models


class LoraConfig(Wire):
    rank: int | None = Field(default=None, validation_alias=alias("rank", "lora_rank"))
    alpha: float | None = Field(default=None, validation_alias=alias("alpha", "lora_alpha"))
    dropout: float | None = Field(default=None, validation_alias=alias("dropout", "lora_dropout"))
    target_modules: list[str] | str | None = None
    seed: Seed | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class OptimizerConfig(Wire):
    type: str | None = None
    learning_rate: Rate | None = Field(None, validation_alias=alias("learning_rate", "lr"))
    weight_decay: Rate | None = None
    betas: tuple[Decay, Decay] | None = None
    eps: Epsilon | None = None
    optimizer_dtype: str | None = None


class CreateModelRequest(Wire):
    """Both dialects: tinker's has session_id and model_seq_id in place of model_id."""

    model_id: ModelId | None = None
    session_id: ModelId | None = None
    model_seq_id: SeqId | None = None
    base_model: str
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig | None = None
    user_metadata: dict[str, str] | None = None


class KillSessionRequest(ModelRequest):
    save_checkpoint: bool = True
    reset_weights: bool = False


class KillSessionResponse(Wire):
    success: bool
    message: str
    checkpoint_path: str | None = None


class SessionInfo(Wire):
    registered_models: list[str]
    active_sessions: int
    session_activity: dict[str, float]
    idle_timeout_seconds: float
    loaded_sampling_adapters: dict[str, int]
    loaded_training_adapters: list[str]
    max_training_adapters: int
    current_training_adapter: str | None


class CreateSessionRequest(Wire):
    session_id: SessionId | None = None
    base_model: str | None = None
    lora_config: LoraConfig | None = None
    tags: list[str] | None = None


class CreateSessionResponse(Wire):
    type: Literal["create_session"] = "create_session"
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class HeartbeatRequest(Wire):
    session_id: str = Field(validation_alias=alias("session_id", "model_id"))


class HeartbeatResponse(Wire):
    type: Literal["session_heartbeat"] = "session_heartbeat"
    session_id: str


# Checkpoints


class SaveWeightsRequest(SequencedRequest):
    path: str | None = None
    overwrite: bool = False
    ttl_seconds: TtlSeconds | None = None
    user_metadata: dict[str, str] | None = None


class SaveSamplerRequest(SequencedRequest):
    """tinker leaves the path out to get a sampling session in place of a checkpoint."""

    name: str | None = Field(None, validation_alias=alias("name", "path"))
    sampling_session_seq_id: SeqId | None = None
    ttl_seconds: TtlSeconds | None = None


class LoadWeightsRequest(Wire):
    model_id: ModelId | None = None
    session_id: ModelId | None = None
    seq_id: SeqId | None = None
    model_seq_id: SeqId | None = None
    path: str
    optimizer: bool = True
    base_model: str | None = None
    optimizer_config: OptimizerConfig | None = None
    user_metadata: dict[str, str] | None = None


class CheckpointRow(Wire):
    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler"]
    time: str
    path: str
    tinker_path: str
    size_bytes: int
    public: bool = False
    expires_at: str | None = None
    user_metadata: dict[str, str] | None = None


class CheckpointList(Wire):
    checkpoints: list[CheckpointRow]


class DeleteCheckpointRequest(ModelRequest):
    checkpoint_id: str


class DeleteCheckpointResponse(Wire):
    success: bool
    deleted_path: str | None = None
    error: str | None = None


class WeightsInfoRequest(Wire):
    path: str = Field(validation_alias=alias("xorl_path", "tinker_path", "path"))


class TrainingRun(Wire):
    training_run_id: str
    base_model: str
    model_owner: str = "local"
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None
    last_request_time: str
    last_checkpoint: CheckpointRow | None = None
    last_sampler_checkpoint: CheckpointRow | None = None
    user_metadata: dict[str, str] | None = None


class Cursor(Wire):
    offset: int
    limit: int
    total_count: int


class TrainingRuns(Wire):
    training_runs: list[TrainingRun]
    cursor: Cursor


class Health(Wire):
    status: Literal["healthy", "starting", "unhealthy"]
    engine_running: bool
    active_requests: int
    total_requests: int


class Moved(Wire):
    """Answer of /sleep and /wake_up."""

    success: bool
    result: str
