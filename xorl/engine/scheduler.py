"""Decides whose command runs next: one model's in order of arrival, models in turn by deficit round robin."""

from collections import OrderedDict, deque
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Queued(NamedTuple, Generic[T]):
    item: T
    cost: int


class Scheduler(Generic[T]):
    """Queues of commands by model_id.

    Each turn gives a model `quantum` tokens of credit, which it spends on commands; what it cannot spend it keeps
    while it has commands waiting. (Shreedhar and Varghese 1995, deficit round robin.)
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._queues: OrderedDict[str, deque[_Queued[T]]] = OrderedDict()
        self._credit: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def add(self, model_id: str, item: T, cost: int) -> None:
        """Queue a command that computes `cost` tokens (0 for those that compute none)."""
        if model_id not in self._queues:
            self._queues[model_id] = deque()
            self._credit[model_id] = self._quantum
        self._queues[model_id].append(_Queued(item, cost))

    def next(self) -> T | None:
        """Take the command whose turn it is, or None when nothing waits."""
        while self._queues:
            model_id, queue = next(iter(self._queues.items()))
            if queue[0].cost <= self._credit[model_id]:
                self._credit[model_id] -= queue[0].cost
                item = queue.popleft().item
                if not queue:
                    del self._queues[model_id], self._credit[model_id]
                return item
            self._credit[model_id] += self._quantum
            self._queues.move_to_end(model_id)
        return None
