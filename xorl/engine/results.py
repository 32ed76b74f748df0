"""Turns what the device computed into one result a request, on the host."""

import bisect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xorl.engine import losses
from xorl.engine.batching import Batch, Cohort
from xorl.engine.commands import ForwardResult, OptimStepResult
from xorl.engine.transfer import Arriving
from xorl.errors import NonFinite


class Outputs:
    """The log-probabilities and losses of a step's requests, which may still be on their way to the host."""

    def __init__(
        self,
        cohorts: Sequence[Cohort],
        batches: Sequence[Batch],
        arriving: Sequence[Arriving],
        add_others: Callable[[Sequence[Tensor]], None],
    ) -> None:
        """
        Args:
            arriving: log-probabilities [T, K] and loss [T] of every portion of each batch, in turn.
            add_others: adds what the other ranks have where there are zeros here.
        """
        self._cohorts = cohorts
        self._batches = batches  # their memory is in use until everything has arrived
        self._arriving = arriving
        self._add_others = add_others
        self._by_cohort: list[tuple[Tensor, Tensor]] | None = None

    def result(self, request: int) -> ForwardResult:
        """
        Raises:
            NonFinite: naming the datum.
        """
        outputs = self._gathered()
        c, cohort = next((c, cohort) for c, cohort in enumerate(self._cohorts) if request in cohort.members)
        member = cohort.members.index(request)
        start, stop = cohort.bounds[member : member + 2]
        logprobs_TK, loss_T = (x[start:stop] for x in outputs[c])
        inputs = cohort.of(member)
        _refuse_non_finite(logprobs_TK, loss_T, inputs.offsets)
        return ForwardResult(
            logprobs=logprobs_TK.numpy().tobytes(),
            elementwise_loss=loss_T.numpy().tobytes() if losses.reports_elementwise(cohort.loss) else None,
            metrics=losses.metrics(cohort.loss, logprobs_TK, loss_T, inputs),
        )

    def _gathered(self) -> list[tuple[Tensor, Tensor]]:
        """Of each cohort, in the order of its requests."""
        if self._by_cohort is None:
            self._by_cohort = [
                (torch.zeros(cohort.inputs.targets_TK.shape), torch.zeros(cohort.tokens_T.shape))
                for cohort in self._cohorts
            ]
            for batch, arriving in zip(self._batches, self._arriving, strict=True):
                arriving.wait()
                for i, portion in enumerate(batch.portions):
                    for whole, part in zip(self._by_cohort[portion.cohort], arriving.tensors[2 * i :], strict=False):
                        whole[portion.positions_T] = part
            self._batches, self._arriving = (), ()
            self._add_others([tensor for tensors in self._by_cohort for tensor in tensors])
        return self._by_cohort


def optim_result(arriving: Arriving, learning_rate: float) -> OptimStepResult:
    """What TrainedModel.optim_step tells.

    Raises:
        NonFinite: the gradient was NaN or infinite.
    """
    arriving.wait()
    grad_norm, num_requests, step = arriving.tensors[0].tolist()
    if num_requests == 0:  # there was no gradient, or no finite one
        grad_norm = 0.0
    if not math.isfinite(grad_norm):
        raise NonFinite(f"the gradient's norm is {grad_norm}; the accumulated gradient was dropped")
    return OptimStepResult(grad_norm=grad_norm, learning_rate=learning_rate, step=int(step))


def _refuse_non_finite(logprobs_TK: Tensor, loss_T: Tensor, offsets: Sequence[int]) -> None:
    finite_T = logprobs_TK.isfinite().all(dim=1) & loss_T.isfinite()
    if finite_T.all():
        return
    first = int((~finite_T).nonzero()[0])
    datum = bisect.bisect_right(offsets, first) - 1
    raise NonFinite(
        f"data[{datum}]: the loss is {loss_T[first].item()} at position {first - offsets[datum]} "
        f"(log-probability {logprobs_TK[first].tolist()}); no gradient was kept"
    )
