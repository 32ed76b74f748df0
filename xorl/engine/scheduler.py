"""Decides which requests run together, and whose turn it is."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Work(NamedTuple, Generic[T]):
    """A request, as the scheduler sees it.

    Attributes:
        cost: tokens it computes, or as many as take its time.
        shares: it may run in one step with others that have the same here; None runs alone.
    """

    item: T
    cost: int
    shares: Hashable = None


class _Queue(Generic[T]):
    def __init__(self, credit: float) -> None:
        self.waiting: deque[Work[T]] = deque()
        self.credit = credit


class Scheduler(Generic[T]):
    """Queues by model_id: one model's requests in order of arrival, models in turn by deficit round robin.

    Each turn gives a model a quantum of tokens, times its weight; it may overdraw, and then waits for as many turns as
    that takes. A model that has not been here for a round goes before those that wait: so small and rare requests
    overtake deep queues, and who computes more than his share gains nothing by it.
    Sources: Shreedhar and Varghese 1995 (deficit round robin); RFC 8290 (FQ-CoDel), its new and old queues.
    """

    def __init__(self, quantum: int, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        self._quantum = quantum
        self._weight = weight
        self._new: OrderedDict[str, _Queue[T]] = OrderedDict()
        self._old: OrderedDict[str, _Queue[T]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, model_id: str, work: Work[T]) -> None:
        queue = self._new.get(model_id) or self._old.get(model_id)
        if queue is None:
            queue = self._new[model_id] = _Queue(self._share(model_id))
        queue.waiting.append(work)
        self._num_waiting += 1

    def next(self, budget: int, max_models: int) -> list[T]:
        """Take the requests that run next: those whose turn it is, for as long as they can share a step.

        The first decides what the others must share with it, and is taken whatever it costs. A model whose oldest
        request cannot join is passed over, and keeps its turn for the next step.

        Args:
            budget: the most tokens of a step with more than one request.
            max_models: the most models in a step.

        Returns:
            One model's requests in order of arrival; empty when nothing waits.
        """
        step: list[T] = []
        models: set[str] = set()
        shares: Hashable = None
        passed: list[tuple[OrderedDict[str, _Queue[T]], str, _Queue[T]]] = []
        while self._num_waiting and budget > 0 and (not step or shares is not None):
            turn = self._turn(any_passed=bool(passed))
            if turn is None:
                break
            queues, model_id = turn
            queue = queues[model_id]
            work = queue.waiting[0] if queue.waiting else None
            joins = not step or (work is not None and work.shares == shares and work.cost <= budget)
            if work and joins and (model_id in models or len(models) < max_models):
                step.append(self._take(queue))
                models.add(model_id)
                shares, budget = work.shares, budget - work.cost
            else:
                passed.append((queues, model_id, queues.pop(model_id)))
        for queues, model_id, queue in reversed(passed):
            queues[model_id] = queue
            queues.move_to_end(model_id, last=False)
        return step

    def _turn(self, *, any_passed: bool) -> tuple[OrderedDict[str, _Queue[T]], str] | None:
        """The model whose turn it is, and where it stands.

        Models in debt are paid on the way. An empty queue is dropped when its turn comes, not when others were only
        passed over: who comes back before that has kept his place.
        """
        while queues := self._new or self._old:
            model_id, queue = next(iter(queues.items()))
            if queue.credit <= 0:
                queue.credit += self._share(model_id)
            elif queue.waiting or any_passed:
                return queues, model_id
            elif queues is self._old:
                del self._old[model_id]
                continue
            self._old[model_id] = queues.pop(model_id)
        return None

    def _take(self, queue: _Queue[T]) -> T:
        work = queue.waiting.popleft()
        queue.credit -= work.cost
        self._num_waiting -= 1
        return work.item

    def _share(self, model_id: str) -> float:
        return self._quantum * self._weight(model_id)
