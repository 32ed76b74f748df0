"""Keeps track of the endpoints of one sync: who is in it still, and why the others are not."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from xorl.engine.commands import Endpoint, EndpointReport
from xorl.sync.dialects import Dialect, dialect_of
from xorl.sync.phases import Phases
from xorl.sync.receiver import Receiver, ReceiverError, ServerInfo
from xorl.sync.terms import Way
from xorl.types import PauseMode


@dataclass(eq=False)
class Target:
    """An endpoint with what became of it.

    Attributes:
        info, dialect, way: what it says of itself, how it is spoken to, and how weights get there.
        problem: why it is out of the sync.
        refused: it answered, so it is alive, and said no.
        touched: some of the new weights may be in it.
        whole: all of them are.
        remarks: what the caller should know of a success.
    """

    endpoint: Endpoint
    receiver: Receiver
    info: ServerInfo = field(init=False)
    dialect: Dialect = field(init=False)
    way: Way = field(init=False)
    problem: str | None = None
    refused: bool = False
    touched: bool = False
    whole: bool = False
    remarks: list[str] = field(default_factory=list[str])

    @property
    def servable(self) -> bool:
        return not self.touched or (self.whole and self.problem is None)

    def probe(self) -> None:
        self.info = self.receiver.server_info()
        self.dialect = dialect_of(self.receiver)

    def fail(self, error: ReceiverError | str) -> None:
        self.problem = str(error)
        self.refused = isinstance(error, ReceiverError) and error.status is not None


Ask = Callable[[Target], None]


class Targets:
    """Endpoints of one sync, all or some; they are asked all at once, each from a thread of its own."""

    def __init__(self, targets: Sequence[Target], threads: ThreadPoolExecutor) -> None:
        self._targets = targets
        self._threads = threads

    @property
    def live(self) -> list[Target]:
        return [target for target in self._targets if target.problem is None]

    def among(self, wanted: Callable[[Target], bool]) -> "Targets":
        """Those who are in and are wanted."""
        return Targets([target for target in self.live if wanted(target)], self._threads)

    def start(self, target: Target, ask: Ask) -> Future[None]:
        return self._threads.submit(ask, target)

    def each(self, ask: Ask) -> bool:
        """Ask all who are in; who fails is out. Returns whether nobody failed."""
        failures = self._ask(self.live, ask)
        for target, error in failures:
            target.fail(error)
        return not failures

    def each_may_refuse(self, ask: Ask) -> None:
        """Ask all who are in for something without which the sync is a success still; the report says who refused."""
        for target, error in self._ask(self.live, ask):
            if error.status is None:
                target.fail(error)
            else:
                target.remarks.append(str(error))

    @contextmanager
    def paused(self, mode: PauseMode, phases: Phases) -> Iterator[None]:
        """Generation rests meanwhile. Who then has whole weights, old or new, goes on.

        Others stay as they are: with a mixture, or with keys and values of the old weights, for all that is known.
        """
        with phases.timed("pause"):
            self.each(lambda target: target.receiver.pause(mode))
        try:
            yield
        finally:
            servable = [target for target in self._targets if target.servable]
            with phases.timed("resume"):
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
            for target in self._targets
        ]

    def _ask(self, targets: Sequence[Target], ask: Ask) -> list[tuple[Target, ReceiverError]]:
        answers = [(target, self.start(target, ask)) for target in targets]
        failures = [(target, failure(answer)) for target, answer in answers]
        return [(target, error) for target, error in failures if error is not None]


@contextmanager
def reaching(endpoints: Sequence[Endpoint], timeout_s: float) -> Iterator[Targets]:
    """The endpoints as targets, with `timeout_s` for each answer."""
    targets = [Target(each, Receiver(each.host, each.port, each.api_key, timeout_s)) for each in endpoints]
    with ThreadPoolExecutor(max(1, len(targets)), thread_name_prefix="sync") as threads:
        yield Targets(targets, threads)
    for target in targets:
        target.receiver.close()


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
    return f"{target.problem}; it stays paused until a sync succeeds"
