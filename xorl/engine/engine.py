"""Does what each command says."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from xorl.config import Config
from xorl.engine import checkpoint
from xorl.engine.adapters import TrainedModels
from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    CreateModel,
    Done,
    Forward,
    ForwardBackward,
    LoadWeights,
    OptimStep,
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
from xorl.engine.forward import AnyForward, Deferred, Packed, SharedForward, failure
from xorl.engine.model import BaseModel
from xorl.engine.ranks import ONE_RANK, Ranks
from xorl.engine.results import optim_result
from xorl.engine.transfer import Transfer
from xorl.errors import Asleep
from xorl.sync.disk import Shelf
from xorl.sync.push import WeightSync


class Prepared(NamedTuple):
    """Commands that run in one step.

    Attributes:
        packed: if they are forward and forward_backward requests, the batches that they share.
        refused: those that could not be packed, by their place among the commands.
    """

    commands: Sequence[AnyCommand]
    packed: Packed | None = None
    refused: Mapping[int, Deferred] = {}


class Engine:
    """The base model, everything trained on it, and one method for each thing a client can ask.

    A step has three stages, which may run at one time for three steps in a row, each on a thread of its own: `prepare`
    touches no model, `compute` only tells the device what to do (files and the network apart), and the results that
    it leaves are waited for by whoever delivers them. All decisions come before `compute`, so that it does the same
    wherever the same steps arrive.
    """

    def __init__(self, config: Config, spill_dir: Path, ranks: Ranks = ONE_RANK) -> None:
        """Models that are set aside on the CPU are kept in `spill_dir`, which nobody else may use."""
        self.settings = config.engine
        self.base = BaseModel(
            config.base,
            ranks,
            shard=self.settings.shard,
            activation_checkpointing=self.settings.activation_checkpointing,
            offload_activations=self.settings.offload_activations,
        )
        self.models = TrainedModels(self.base, self.settings.max_resident_adapters, spill_dir)
        self._transfer = Transfer(self.base.device)
        self.forward = SharedForward(self.base, self.models, self.settings, self._transfer)
        shelf = Shelf(self.settings.output_dir.resolve() / ".sync", self.base.network.config)
        self._sync = WeightSync(config.sync.sync_timeout_s, self.base.device, shelf)
        self._asleep = False

    def close(self) -> None:
        self._sync.close()

    def run(self, command: AnyCommand) -> AnyResult:
        """Run one command through all stages; all ranks are to run it.

        Raises:
            XorlError: the command failed; the model is as it was before.
        """
        max_tokens = self.base.ranks.from_first(lambda: self.forward.budget.tokens)
        (result,) = self.compute(self.prepare([command], max_tokens))
        return result()

    def prepare(self, commands: Sequence[AnyCommand], max_tokens: int | None = None) -> Prepared:
        """Pack the requests of a step into batches of at most `max_tokens`, by default of the present budget, and copy
        them to the device."""
        max_tokens = max_tokens or self.forward.budget.tokens
        requests = {n: command for n, command in enumerate(commands) if isinstance(command, AnyForward)}
        if not requests:
            return Prepared(commands)
        try:
            return Prepared(commands, self.forward.prepare(requests, max_tokens))
        except Exception:  # of one of them, which must not reach the others
            refused = {
                n: failure(error) for n, request in requests.items() if (error := self._fault(request, max_tokens))
            }
            good = {n: request for n, request in requests.items() if n not in refused}
            return Prepared(commands, self.forward.prepare(good, max_tokens) if good else None, refused)

    def _fault(self, request: AnyForward, max_tokens: int) -> Exception | None:
        try:
            self.forward.prepare({0: request}, max_tokens)
        except Exception as error:
            return error

    def compute(self, prepared: Prepared) -> list[Deferred]:
        """Run a step; gives each command's result, or raises its failure, when called: on all ranks in one order.

        Raises:
            RankDivergence: a command failed on some ranks only.
        """
        outcomes = dict(prepared.refused)
        self.base.ranks.refuse_difference([n in outcomes for n in range(len(prepared.commands))])
        if prepared.packed and not self._asleep:
            outcomes |= self.forward.compute(prepared.packed)
        failed: list[bool] = []
        for n, command in enumerate(prepared.commands):
            if n not in outcomes:
                outcomes[n], error = self._run_alone(command)
                failed.append(error is not None)
        self.base.ranks.refuse_difference(failed)
        return [outcomes[n] for n in range(len(prepared.commands))]

    def _run_alone(self, command: AnyCommand) -> tuple[Deferred, Exception | None]:
        try:
            return self._run(command), None
        except Exception as error:  # one command's failure is its own: the engine goes on
            return failure(error), error

    def _run(self, command: AnyCommand) -> Deferred:
        if self._asleep and not isinstance(command, WakeUp | Sleep | UnloadModel):
            raise Asleep("the model is asleep: POST /wake_up first")
        match command:
            case OptimStep():
                return self._optim_step(command)
            case CreateModel():
                self.models.create(command.model_id, command.lora)
                result = Done()
            case UnloadModel():
                self.models.remove(command.model_id)
                result = Done()
            case SaveWeights():
                result = self._save_weights(command)
            case LoadWeights():
                model = self.models[command.model_id]
                checkpoint.load_training(model, self.base, Path(command.directory), optimizer=command.optimizer)
                result = Done()
            case SaveSampler():
                result = self._save_sampler(command)
            case SyncWeights():
                result = self._sync_weights(command)
            case Sleep():
                result = self._move_to(torch.device("cpu"), asleep=True)
            case WakeUp():
                result = self._move_to(self.base.device, asleep=False)
            case Forward() | ForwardBackward():
                raise AssertionError("prepare packs these")
        return lambda: result

    def _optim_step(self, command: OptimStep) -> Deferred:
        told = self.models[command.model_id].optim_step(command.adam, self.base.ranks)
        return partial(optim_result, self._transfer.outward([told]), command.adam.learning_rate)

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
        weights = merged_tensors(self.models[command.model_id], self.base)
        return self.base.ranks.from_first(lambda: self._sync.push(command, weights))

    def _move_to(self, device: torch.device, *, asleep: bool) -> Done:
        self.base.move(device)
        self.models.move(device)
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self._asleep = asleep
        return Done()
