"""Does what each command says."""

import bisect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xorl.config import Config
from xorl.engine import checkpoint, losses
from xorl.engine.adapters import TrainedModel, TrainedModels
from xorl.engine.batching import Batch, Request, pack, unpack
from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    CreateModel,
    Done,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoadWeights,
    OptimStep,
    OptimStepResult,
    SaveResult,
    SaveSampler,
    SaveWeights,
    Sleep,
    SyncReport,
    SyncWeights,
    UnloadModel,
    WakeUp,
)
from xorl.engine.export import merged_tensors
from xorl.engine.losses import LossInputs
from xorl.engine.model import BaseModel
from xorl.errors import Asleep, NonFinite, OutOfMemory
from xorl.sync.disk import Shelf
from xorl.sync.push import WeightSync
from xorl.types import UNEMBEDDING, AnyLoss
from xorl_kernels.logprobs import logprobs


class Engine:
    """The base model, everything trained on it, and one method for each thing a client can ask."""

    def __init__(self, config: Config, spill_dir: Path) -> None:
        """Models that are set aside on the CPU are kept in `spill_dir`, which nobody else may use."""
        self._config = config.engine
        self.base = BaseModel(config.base, activation_checkpointing=config.engine.activation_checkpointing)
        self.models = TrainedModels(self.base, config.engine.max_resident_adapters, spill_dir)
        shelf = Shelf(config.engine.output_dir.resolve() / ".sync", self.base.network.config)
        self._sync = WeightSync(config.sync.sync_timeout_s, self.base.device, shelf)
        self._asleep = False

    def close(self) -> None:
        self._sync.close()

    def run(self, command: AnyCommand) -> AnyResult:
        """Run one command to its end.

        Raises:
            XorlError: the command failed; the model is as it was before.
        """
        if self._asleep and not isinstance(command, WakeUp | Sleep | UnloadModel):
            raise Asleep("the model is asleep: POST /wake_up first")
        match command:
            case ForwardBackward():
                return self._forward_backward(command)
            case Forward():
                return self._forward(command)
            case OptimStep():
                return self._optim_step(command)
            case CreateModel():
                self.models.create(command.model_id, command.lora)
                return Done()
            case UnloadModel():
                self.models.remove(command.model_id)
                return Done()
            case SaveWeights():
                return self._save_weights(command)
            case LoadWeights():
                model = self.models[command.model_id]
                checkpoint.load_training(model, self.base, Path(command.directory), optimizer=command.optimizer)
                return Done()
            case SaveSampler():
                return self._save_sampler(command)
            case SyncWeights():
                return self._sync_weights(command)
            case Sleep():
                return self._move_to(torch.device("cpu"), asleep=True)
            case WakeUp():
                return self._move_to(self.base.device, asleep=False)

    def _forward_backward(self, command: ForwardBackward) -> ForwardResult:
        model = self.models[command.model_id]
        request = unpack(command.datums)

        def backward(max_tokens: int) -> ForwardResult:
            with model.accumulating():
                return self._run_batches(model, request, command.loss, max_tokens, backward=True)

        result = self._with_memory(backward, request)
        if command.token_mean:
            model.num_mean_tokens += int(losses.num_valid(command.loss, _whole(request)))
        return result

    def _forward(self, command: Forward) -> ForwardResult:
        model = self.models[command.model_id]
        request = unpack(command.datums)
        with torch.no_grad():
            return self._with_memory(
                lambda max_tokens: self._run_batches(model, request, command.loss, max_tokens, backward=False), request
            )

    def _with_memory(self, attempt: Callable[[int], ForwardResult], request: Request) -> ForwardResult:
        """Run with the configured batch size, halving it for as long as memory runs out and that can help."""
        max_tokens = self._config.max_batch_tokens
        longest = max(request.lengths)
        while True:
            try:
                return attempt(max_tokens)
            except torch.OutOfMemoryError as error:
                if max_tokens <= longest:
                    raise OutOfMemory(f"a datum of {longest} tokens does not fit in memory: {error}") from error
                max_tokens = max(max_tokens // 2, longest)
                torch.cuda.empty_cache()

    def _run_batches(
        self, model: TrainedModel, request: Request, loss: AnyLoss, max_tokens: int, *, backward: bool
    ) -> ForwardResult:
        logprobs_TK = torch.zeros(request.targets_TK.shape)
        loss_T = torch.zeros(request.tokens_T.shape)
        for batch in pack(request, max_tokens):
            batch_logprobs, batch_loss = self._run_batch(model, batch.to(self.base.device), loss, backward=backward)
            logprobs_TK[batch.positions_T] = batch_logprobs.cpu()
            loss_T[batch.positions_T] = batch_loss.cpu()
        _refuse_non_finite(logprobs_TK, loss_T, request.offsets)
        return ForwardResult(
            logprobs=logprobs_TK.numpy().tobytes(),
            elementwise_loss=loss_T.numpy().tobytes() if losses.reports_elementwise(loss) else None,
            metrics=losses.metrics(loss, logprobs_TK, loss_T, _whole(request)),
        )

    def _run_batch(self, model: TrainedModel, batch: Batch, loss: AnyLoss, *, backward: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities [T, K] and loss [T] of one batch; with `backward`, its gradient too."""
        spans = [model.span(len(batch.tokens_T))] if model.spec else []
        with self.base.router.routing(spans):  # backward inside: recomputed activations are routed again
            hidden_TH = self.base.hidden_states(batch.tokens_T, batch.lengths)
            logprobs_TK = logprobs(
                hidden_TH,
                self.base.head_VH,
                batch.targets_TK,
                temperature=losses.temperature(loss),
                chunk_tokens=self._config.logprob_chunk_tokens,
                tail=_unembedding_tail(model, hidden_TH),
            )
            inputs = LossInputs(targets_TK=batch.targets_TK, offsets=batch.offsets, arrays=batch.arrays)
            loss_T = losses.elementwise(loss, logprobs_TK, inputs)
            if backward:
                loss_T.sum().backward()
        return logprobs_TK.detach(), loss_T.detach()

    def _optim_step(self, command: OptimStep) -> OptimStepResult:
        model = self.models[command.model_id]
        grad_norm = model.optim_step(command.adam)
        return OptimStepResult(grad_norm=grad_norm, learning_rate=command.adam.learning_rate, step=model.num_steps)

    def _save_weights(self, command: SaveWeights) -> SaveResult:
        size_bytes = checkpoint.save_training(
            self.models[command.model_id],
            self.base,
            model_id=command.model_id,
            name=command.name,
            directory=Path(command.directory),
            replace=command.replace,
            user_metadata=command.user_metadata,
        )
        return SaveResult(size_bytes)

    def _save_sampler(self, command: SaveSampler) -> SaveResult:
        size_bytes = checkpoint.save_sampler(
            self.models[command.model_id],
            self.base,
            model_id=command.model_id,
            name=command.name,
            directory=Path(command.directory),
            replace=command.replace,
        )
        return SaveResult(size_bytes)

    def _sync_weights(self, command: SyncWeights) -> SyncReport:
        return self._sync.push(command, merged_tensors(self.models[command.model_id], self.base))

    def _move_to(self, device: torch.device, *, asleep: bool) -> Done:
        self.base.move(device)
        self.models.move(device)
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self._asleep = asleep
        return Done()


def _whole(request: Request) -> LossInputs:
    return LossInputs(targets_TK=request.targets_TK, offsets=request.offsets, arrays=request.arrays)


def _unembedding_tail(model: TrainedModel, hidden_TH: Tensor) -> tuple[Tensor, Tensor] | None:
    """The adapter's own addition to the logits, (s h Aᵀ, B), where it trains the unembedding."""
    if model.spec is None or UNEMBEDDING not in model.spec.target_modules:
        return None
    pair = model.pair(UNEMBEDDING)
    return hidden_TH @ (model.spec.scale * pair.a_RI).to(hidden_TH.dtype).T, pair.b_OR.to(hidden_TH.dtype)


def _refuse_non_finite(logprobs_TK: Tensor, loss_T: Tensor, offsets: list[int]) -> None:
    finite_T = logprobs_TK.isfinite().all(dim=1) & loss_T.isfinite()
    if finite_T.all():
        return
    first = int((~finite_T).nonzero()[0])
    datum = bisect.bisect_right(offsets, first) - 1
    raise NonFinite(
        f"data[{datum}]: the loss is {loss_T[first].item()} at position {first - offsets[datum]} "
        f"(log-probability {logprobs_TK[first].tolist()}); no gradient was kept"
    )
