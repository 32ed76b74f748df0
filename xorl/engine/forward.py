"""Runs forward and forward_backward requests of many models together, in shared batches.

T: tokens of a batch; S: those of one portion of it; K: candidate targets a position; H: hidden size; N: requests.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from xorl.config import EngineConfig
from xorl.engine import losses
from xorl.engine.adapters import Gradient, TrainedModel, TrainedModels
from xorl.engine.attention import Sequences
from xorl.engine.batching import Batch, Cohort, Portion, Share, cohorts, pack
from xorl.engine.commands import AnyResult, Forward, ForwardBackward
from xorl.engine.lora import Adapter, Pair, Span
from xorl.engine.memory import MemoryMeter, TokenBudget, is_out_of_memory
from xorl.engine.model import BaseModel
from xorl.engine.ranks import RankDivergence
from xorl.engine.results import Outputs
from xorl.engine.transfer import Arriving, Transfer, Wait
from xorl.errors import OutOfMemory, XorlError
from xorl.types import UNEMBEDDING
from xorl_kernels.logprobs import logprobs

Deferred = Callable[[], AnyResult]
"""Gives a command's result, or raises why it failed; waits for the device, so it is called where nobody else waits."""

AnyForward = Forward | ForwardBackward


class Packed(NamedTuple):
    """Requests, each under its number in the step, as this rank's batches on the device; usable after `wait`.

    Attributes:
        max_tokens: what batches had to keep to.
        longest_batch: of any rank.
    """

    requests: Mapping[int, AnyForward]
    cohorts: list[Cohort]
    num_mean_tokens: dict[int, int]
    max_tokens: int
    longest_batch: int
    batches: list[tuple[Batch, Sequences]]
    wait: Wait

    @property
    def longest_datum(self) -> int:
        return max(length for cohort in self.cohorts for length in cohort.lengths)


class Running(NamedTuple):
    """A request while it runs: `gradient` is None if it wants none."""

    model: TrainedModel
    gradient: Gradient | None

    @property
    def adapter(self) -> Adapter:
        return self.model.adapter if self.gradient is None else self.gradient.adapter

    @property
    def scale(self) -> float:
        return self.model.spec.scale if self.model.spec else 0.0


class Ran(NamedTuple):
    """What the batches of a step have left on the device; `num_bad_N` counts tokens that are not finite."""

    running: Mapping[int, Running]
    num_bad_N: Tensor
    arriving: list[Arriving]


class SharedForward:
    """Each request's results and gradient are what it would get alone, up to rounding; one that fails harms no other.

    A request has a gradient of its own until all of it has run, and the device decides whether that one counts.
    """

    def __init__(self, base: BaseModel, models: TrainedModels, config: EngineConfig, transfer: Transfer) -> None:
        self._base = base
        self._models = models
        self._config = config
        self._transfer = transfer
        self._ranks = base.ranks
        self._share = Share(base.ranks.rank, base.ranks.size, in_step=base.sharded)
        self._meter = MemoryMeter(base.device)
        self.budget = TokenBudget(config.max_batch_tokens)
        self.peak_bytes = 0

    def prepare(self, requests: Mapping[int, AnyForward], max_tokens: int) -> Packed:
        """Pack this rank's share of the requests into batches of at most `max_tokens`."""
        step = cohorts(requests)
        num_mean_tokens = {
            number: int(losses.num_valid(cohort.loss, cohort.of(member)))
            for cohort in step
            for member, number in enumerate(cohort.members)
            if isinstance(request := requests[number], ForwardBackward) and request.token_mean
        }
        packed, longest_batch = pack(step, max_tokens, self._share)

        def on_device(copy: Callable[[Tensor], Tensor]) -> list[tuple[Batch, Sequences]]:
            return [(batch.on_device(copy), self._base.sequences(batch.lengths)) for batch in packed]

        batches, wait = self._transfer.inward(on_device)
        return Packed(requests, step, num_mean_tokens, max_tokens, longest_batch, batches, wait)

    def compute(self, packed: Packed) -> dict[int, Deferred]:
        """Run the batches without waiting for them.

        What does not fit into memory runs in batches of half the size. If that does not help, or something else fails,
        the requests run one by one, so that the one to blame fails alone. What fails on one rank fails on all.

        Raises:
            RankDivergence: the base is sharded and this rank failed, while the others wait for its part; or only some
                ranks have the models.
        """
        models, outcomes = self._find_models(packed.requests)
        if outcomes:
            found = {number: request for number, request in packed.requests.items() if number in models}
            return outcomes | (self.compute(self.prepare(found, packed.max_tokens)) if found else {})
        ran = self._attempt(packed, models)
        error = self._ranks.common(ran if isinstance(ran, Exception) else None)
        if error is None and isinstance(ran, Ran):
            outputs = self._keep(packed, ran)
            return {number: partial(outputs.result, number) for number in packed.requests}
        del ran  # what this rank has computed, while another failed
        assert error is not None
        return self._run_smaller(packed, error)

    def _find_models(self, requests: Mapping[int, AnyForward]) -> tuple[dict[int, TrainedModel], dict[int, Deferred]]:
        """The model of each request, on the device; and the failures of those that have none."""
        models, failures = {}, {}
        self._models.touch({request.model_id for request in requests.values()})
        for number, request in requests.items():
            try:
                models[number] = self._models[request.model_id]
            except XorlError as error:
                failures[number] = failure(error)
        self._ranks.refuse_difference([number in models for number in requests])
        return models, failures

    def _attempt(self, packed: Packed, models: Mapping[int, TrainedModel]) -> Ran | Exception:
        try:
            packed.wait()
            return self._run(packed, models)
        except Exception as error:  # of any kind: it must not reach the other requests
            if self._base.sharded:
                raise RankDivergence("a part of the model failed to compute") from error
            if is_out_of_memory(error):
                return OutOfMemory(str(error))
            return error.with_traceback(None)  # whose frames hold the tensors of the batch

    def _run_smaller(self, packed: Packed, error: Exception) -> dict[int, Deferred]:
        if isinstance(error, OutOfMemory):
            self.budget.overflowed(packed.longest_batch)
            self._meter.release()
            if packed.longest_batch > packed.longest_datum:
                smaller = max(packed.longest_batch // 2, packed.longest_datum)
                return self.compute(self.prepare(packed.requests, smaller))
            error = OutOfMemory(f"a datum of {packed.longest_datum} tokens does not fit in memory: {error}")
        if len(packed.requests) == 1:
            return {number: failure(error) for number in packed.requests}
        outcomes = {}
        for number, request in packed.requests.items():
            outcomes |= self.compute(self.prepare({number: request}, packed.max_tokens))
        return outcomes

    def _run(self, packed: Packed, models: Mapping[int, TrainedModel]) -> Ran:
        running = {
            number: Running(
                model, model.new_gradient() if isinstance(packed.requests[number], ForwardBackward) else None
            )
            for number, model in models.items()
        }
        num_bad_N = torch.zeros(max(running) + 1, dtype=torch.int32, device=self._base.device)
        self.peak_bytes = 0
        arriving = [self._run_metered(batch, running, num_bad_N, sequences) for batch, sequences in packed.batches]
        return Ran(running, num_bad_N, arriving)

    def _keep(self, packed: Packed, ran: Ran) -> Outputs:
        """Add the gradients to their models', where no rank has seen a token without one."""
        self._ranks.sum([ran.num_bad_N])
        for number, (model, gradient) in ran.running.items():
            if gradient is not None:
                model.add(gradient, ran.num_bad_N[number] == 0, packed.num_mean_tokens.get(number, 0))
        batches = [batch for batch, _ in packed.batches]
        return Outputs(packed.cohorts, batches, ran.arriving, self._ranks.sum_delivered)

    def _run_metered(
        self, batch: Batch, running: Mapping[int, Running], num_bad_N: Tensor, sequences: Sequences
    ) -> Arriving:
        used_bytes, free_bytes = self._meter.start()
        with torch.set_grad_enabled(batch.backward):
            outputs = self._run_batch(batch, running, num_bad_N, sequences)
        peak_bytes = self._meter.peak_bytes()
        self.budget.fitted(len(batch.tokens_T), peak_bytes - used_bytes, free_bytes)
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        return self._transfer.outward(outputs)

    def _run_batch(
        self, batch: Batch, running: Mapping[int, Running], num_bad_N: Tensor, sequences: Sequences
    ) -> list[Tensor]:
        """Log-probabilities [S, K] and loss [S] of each portion; adds the gradients, and counts tokens without any."""
        runs = [run for portion in batch.portions for run in portion.runs]
        spans = [Span(run.start, run.stop, running[run.request].adapter, running[run.request].scale) for run in runs]
        with self._base.router.routing(spans):  # backward inside: recomputed activations are routed again
            hidden_TH = self._base.hidden_states(batch.tokens_T, batch.places_T, sequences)
            parts = hidden_TH.split([portion.stop - portion.start for portion in batch.portions])
            scored = [self._score(*each, running) for each in zip(parts, batch.portions, strict=True)]
            outputs, slopes = [], []
            for logprobs_SK, portion in zip(scored, batch.portions, strict=True):
                leaf_SK = logprobs_SK.detach().requires_grad_(batch.backward)
                loss_S = losses.elementwise(portion.loss, leaf_SK, portion.inputs)
                outputs += [leaf_SK.detach(), loss_S.detach()]
                if batch.backward:
                    (slope_SK,) = torch.autograd.grad(loss_S.sum(), leaf_SK)
                    bad_S = ~(leaf_SK.isfinite().all(dim=1) & loss_S.isfinite())
                    requests_S = batch.requests_T[portion.start : portion.stop]
                    num_bad_N.index_add_(0, requests_S, bad_S.int())
                    slopes.append(slope_SK.masked_fill_(num_bad_N.index_select(0, requests_S)[:, None] > 0, 0))
            if batch.backward:
                torch.autograd.backward(scored, slopes)
        return outputs

    def _score(self, hidden_SH: Tensor, portion: Portion, running: Mapping[int, Running]) -> Tensor:
        """Log-probabilities [S, K] of a portion, for each adapter apart where one of them trains the unembedding."""
        head_VH, temperature = self._base.head_VH, losses.temperature(portion.loss)
        chunk_tokens = self._config.logprob_chunk_tokens
        tails = [_unembedding_tail(running[run.request]) for run in portion.runs]
        if not any(tails):
            return logprobs(hidden_SH, head_VH, portion.targets_TK, temperature=temperature, chunk_tokens=chunk_tokens)
        scored = []
        for run, tail in zip(portion.runs, tails, strict=True):
            place = slice(run.start - portion.start, run.stop - portion.start)
            own_SH = hidden_SH[place]
            scored.append(
                logprobs(
                    own_SH,
                    head_VH,
                    portion.targets_TK[place],
                    temperature=temperature,
                    chunk_tokens=chunk_tokens,
                    tail=tail and (own_SH @ tail.a_RI.to(own_SH.dtype).T, tail.b_OR.to(own_SH.dtype)),
                )
            )
        return torch.cat(scored)


def _unembedding_tail(running: Running) -> Pair | None:
    """The adapter's own addition to the logits, (s A, B), where it trains the unembedding."""
    pair = running.adapter.get(UNEMBEDDING)
    return pair and Pair(running.scale * pair.a_RI, pair.b_OR)


def failure(error: Exception) -> Deferred:
    def fail() -> AnyResult:
        raise error

    return fail
