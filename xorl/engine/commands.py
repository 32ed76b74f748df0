"""The messages between the control plane and the engine: one frozen struct an operation, and its result.

Arrays are raw little-endian buffers, never lists. N: datums, T: tokens of all datums together,
K: candidate targets a position (1, or more for soft targets).
"""

import msgspec

from xorl.quantization import Fp8
from xorl.types import AdamParams, AnyLoss, CacheMode, LoraSpec, PauseMode

Buffer = bytes


class Datums(msgspec.Struct, frozen=True):
    """N training examples as columns. Position i of a datum predicts `targets[i]` from tokens 0..i."""

    tokens: Buffer  # int32 [T]
    offsets: Buffer  # int32 [N + 1], where each datum begins in tokens
    targets: Buffer  # int32 [T, K]; -100 is ignored
    loss_inputs: dict[str, Buffer]  # float32; weights is [T, K], all others [T]
    num_targets: int = 1  # K


class Command(msgspec.Struct, frozen=True, tag_field="command", kw_only=True):
    """Base of all commands. One model's commands run in the order in which they were sent."""


class ModelCommand(Command, frozen=True, kw_only=True):
    model_id: str


class CreateModel(ModelCommand, frozen=True, tag=True, kw_only=True):
    """Register a model. Succeeds on an existing id when the spec agrees; `lora` None trains full weights."""

    lora: LoraSpec | None


class UnloadModel(ModelCommand, frozen=True, tag=True, kw_only=True):
    pass


class Forward(ModelCommand, frozen=True, tag=True, kw_only=True):
    """Log-probabilities and the loss, without a gradient."""

    datums: Datums
    loss: AnyLoss


class ForwardBackward(ModelCommand, frozen=True, tag=True, kw_only=True):
    """Add the gradient of the summed loss to the model's accumulated gradient.

    `token_mean` says that the next optim_step divides by the number of valid tokens (xorl's convention);
    without it the sum is used as it is (tinker's).
    """

    datums: Datums
    loss: AnyLoss
    token_mean: bool


class OptimStep(ModelCommand, frozen=True, tag=True, kw_only=True):
    adam: AdamParams


class SaveWeights(ModelCommand, frozen=True, tag=True, kw_only=True):
    """Write weights and optimizer state to `directory`, published in one rename.

    `replace` allows the directory to exist. `name` and `user_metadata` go into the manifest.
    """

    directory: str
    name: str
    replace: bool = False
    user_metadata: dict[str, str] | None = None


class LoadWeights(ModelCommand, frozen=True, tag=True, kw_only=True):
    """Restore a model that exists from a checkpoint; drops accumulated gradients."""

    directory: str
    optimizer: bool


class SaveSampler(ModelCommand, frozen=True, tag=True, kw_only=True):
    """Write inference weights: a PEFT adapter, or a Hugging Face model when full weights are trained."""

    directory: str
    name: str
    replace: bool = False


class Endpoint(msgspec.Struct, frozen=True):
    """An inference server as weight sync sees it."""

    host: str
    port: int
    world_size: int = 1


class SyncWeights(ModelCommand, frozen=True, tag=True, kw_only=True):
    """Stream the model's merged weights to every endpoint."""

    endpoints: list[Endpoint]
    master_address: str
    master_port: int  # 0 takes a free port
    group_name: str
    bucket_bytes: int
    flush_cache: bool
    cache_mode: CacheMode
    pause_mode: PauseMode
    weight_version: str | None
    quantization: Fp8 | None  # None: as each endpoint serves them


class Sleep(Command, frozen=True, tag=True, kw_only=True):
    pass


class WakeUp(Command, frozen=True, tag=True, kw_only=True):
    pass


AnyCommand = (
    CreateModel
    | UnloadModel
    | Forward
    | ForwardBackward
    | OptimStep
    | SaveWeights
    | LoadWeights
    | SaveSampler
    | SyncWeights
    | Sleep
    | WakeUp
)


class Done(msgspec.Struct, frozen=True, tag=True):
    """The command did what it says and has nothing to tell."""


class ForwardResult(msgspec.Struct, frozen=True, tag=True):
    """Per-token outputs in request order; `offsets` are the datums' own."""

    logprobs: Buffer  # float32 [T, K]
    elementwise_loss: Buffer | None  # float32 [T]; None for losses that do not report it
    metrics: dict[str, float]


class OptimStepResult(msgspec.Struct, frozen=True, tag=True):
    grad_norm: float
    learning_rate: float
    step: int


class SaveResult(msgspec.Struct, frozen=True, tag=True):
    size_bytes: int


class EndpointReport(msgspec.Struct, frozen=True):
    host: str
    port: int
    success: bool
    message: str


class SyncReport(msgspec.Struct, frozen=True, tag=True):
    """What one weight sync did. `seconds` has one entry a phase."""

    transfer_time: float
    total_bytes: int
    num_parameters: int
    num_buckets: int
    endpoints: list[EndpointReport]
    seconds: dict[str, float]


class Failed(msgspec.Struct, frozen=True, tag=True):
    error: str  # class name in xorl.errors
    message: str


AnyResult = Done | ForwardResult | OptimStepResult | SaveResult | SyncReport | Failed


class ModelInfo(msgspec.Struct, frozen=True, tag=True):
    """What the engine serves; its first message once it is ready."""

    names: list[str]  # the base_model names it answers to, the canonical one first
    path: str
    arch: str
    vocab_size: int
    max_context_length: int
    full_weights: bool
    device: str
    dtype: str
    tied_embeddings: bool


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """What a step of forward and forward_backward requests was like; the engine sends one after each."""

    num_requests: int
    num_tokens: int
    peak_bytes: int  # of memory in use at one time


EngineNews = ModelInfo | StepReport
