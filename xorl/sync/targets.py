"""Keeps track of the endpoints of one sync: who is in it still, and why the others are not."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from xorl.engine.commands import Endpoint, EndpointReport
from xorl.sync.receiver import Receiver, ReceiverError, ServerInfo
from xorl.types import PauseMode


@dataclass(eq=False)
class Target:
    """An endpoint with what became of it.

    Attributes:
        info: what it says of itself.
        problem: why it is out of the sync.
        touched: some of the new weights may be in it.
        whole: all of them are.
        remarks: what the caller should know of a success.
    """

    endpoint: Endpoint
    receiver: Receiver
    problem: str | None = None
    touched: bool = False
    whole: bool = False
    remarks: list[str] = field(default_factory=list[str])
    info: ServerInfo = field(default_factory=ServerInfo)

    @property
    def servable(self) -> bool:
        return self.whole or not self.touched


Ask = Callable[[Target], None]


class Targets:
    """The endpoints of one sync; they are asked all at once, each from a thread of its own."""

    def __init__(self, endpoints: Sequence[Endpoint], timeout_s: float) -> None:
        self._all = [Target(each, Receiver(each.host, each.port, timeout_s)) for each in endpoints]
        self._threads = ThreadPoolExecutor(max(1, len(self._all)), thread_name_prefix="sync")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()
        for target in self._all:
            target.receiver.close()

    @property
    def live(self) -> list[Target]:
        return [target for target in self._all if target.problem is None]

    def start(self, target: Target, ask: Ask) -> Future[None]:
        return self._threads.submit(ask, target)

    def each(self, ask: Ask) -> bool:
        """Ask all who are in; who fails is out. Returns whether nobody failed."""
        failures = self._ask(self.live, ask)
        for target, error in failures:
            target.problem = str(error)
        return not failures

    def each_may_refuse(self, ask: Ask) -> None:
        """Ask all who are in for something without which the sync is a success still; the report says who failed."""
        for target, error in self._ask(self.live, ask):
            target.remarks.append(str(error))

    @contextmanager
    def paused(self, mode: PauseMode) -> Iterator[None]:
        """Generation rests meanwhile. Who then has whole weights, old or new, goes on; a mixture is never served."""
        self.each(lambda target: target.receiver.pause(mode))
        try:
            yield
        finally:
            servable = [target for target in self._all if target.servable]
            for target, error in self._ask(servable, lambda target: target.receiver.resume()):
                target.problem = target.problem or str(error)

    def report(self) -> list[EndpointReport]:
        return [
            EndpointReport(
                host=target.endpoint.host,
                port=target.endpoint.port,
                success=target.whole and target.problem is None,
                message=_message(target),
            )
            for target in self._all
        ]

    def _ask(self, targets: Sequence[Target], ask: Ask) -> list[tuple[Target, ReceiverError]]:
        answers = [(target, self.start(target, ask)) for target in targets]
        failures = [(target, failure(answer)) for target, answer in answers]
        return [(target, error) for target, error in failures if error is not None]


def failure(answer: Future[None]) -> ReceiverError | None:
    """Wait for an answer; returns the receiver's error and raises any other."""
    try:
        answer.result()
    except ReceiverError as error:
        return error
    return None


def _message(target: Target) -> str:
    if target.problem is None:
        return "; ".join(target.remarks)
    if target.servable:
        return target.problem
    return f"{target.problem}; it stays paused, for its weights are a mixture, until a sync succeeds"
