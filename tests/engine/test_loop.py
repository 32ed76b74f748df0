"""The engine's loop on threads of this process: order, overlap, many clients at once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from builders import datums, floats, random_sequences
from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    CreateModel,
    EngineNews,
    Failed,
    Forward,
    ForwardBackward,
    ForwardResult,
    OptimStep,
    OptimStepResult,
    Sleep,
    StepReport,
    UnloadModel,
    WakeUp,
)
from xorl.engine.engine import Engine, Prepared
from xorl.engine.loop import EngineLoop
from xorl.engine.trace import Span, Trace
from xorl.errors import XorlError
from xorl.types import AdamParams, CrossEntropy, LoraSpec, Ppo

NewEngine = Callable[..., Engine]
PATIENCE_S = 60
ADAM = AdamParams(learning_rate=1e-2)


class Client:
    """Sends commands to a loop, and keeps its results by their numbers."""

    def __init__(self, commands: zmq.Socket[bytes], results: zmq.Socket[bytes]) -> None:
        self._commands, self._results = commands, results
        self._numbers = count(1)
        self.results: dict[int, AnyResult] = {}
        self.order: list[int] = []
        self.news: list[EngineNews] = []

    def send(self, *commands: AnyCommand) -> list[int]:
        numbers = [next(self._numbers) for _ in commands]
        for number, command in zip(numbers, commands, strict=True):
            self._commands.send_multipart([number.to_bytes(8), msgspec.msgpack.encode(command)])
        return numbers

    def get(self, numbers: Sequence[int]) -> list[Any]:
        while not self.results.keys() >= set(numbers):
            assert self._results.poll(1000 * PATIENCE_S), "the loop is stuck"
            head, body = self._results.recv_multipart()
            if number := int.from_bytes(head):
                self.order.append(number)
                self.results[number] = msgspec.msgpack.decode(body, type=AnyResult)
            else:
                self.news.append(msgspec.msgpack.decode(body, type=EngineNews))
        return [self.results[number] for number in numbers]

    def run(self, *commands: AnyCommand) -> list[Any]:
        return self.get(self.send(*commands))


@contextmanager
def serving(engine: Engine, trace: Trace | None = None) -> Iterator[Client]:
    """A loop for the block."""
    context, ended = zmq.Context(), threading.Event()
    pairs = []
    for name in ("commands", "results"):
        ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for socket in (ours, theirs):
            socket.set_hwm(0)
        ours.bind(f"inproc://{name}")
        theirs.connect(f"inproc://{name}")
        pairs.append((ours, theirs))
    loop = EngineLoop(engine, pairs[0][1], pairs[1][1], trace or Trace())
    thread = threading.Thread(target=loop.run, args=[lambda: not ended.is_set()])
    thread.start()
    try:
        yield Client(pairs[0][0], pairs[1][0])
    finally:
        ended.set()
        thread.join()
        context.destroy(linger=0)


def some_datums(seed: int, lengths: Sequence[int] = (7, 3)) -> Any:
    return datums(random_sequences(np.random.default_rng(seed), lengths))


def batch(model_id: str, seed: int = 0) -> ForwardBackward:
    return ForwardBackward(model_id=model_id, datums=some_datums(seed), loss=CrossEntropy(), token_mean=True)


def new_model(model_id: str) -> CreateModel:
    return CreateModel(model_id=model_id, lora=LoraSpec(rank=2, seed=1))


class WatchedTrace(Trace):
    """Lets a stage wait for what another one records."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def add(self, span: Span) -> None:
        with self._changed:
            super().add(span)
            self._changed.notify_all()

    def wait_for(self, stage: str, step: int) -> bool:
        def recorded() -> bool:
            return any((span.stage, span.step) == (stage, step) for span in self.spans())

        with self._changed:
            return self._changed.wait_for(recorded, PATIENCE_S)


def test_stages_overlap(new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step n computes until step n + 1 is prepared and step n - 1 delivered: without overlap it would wait for ever."""
    engine, trace = new_engine(max_batch_tokens=10), WatchedTrace()
    commands = [new_model("a"), *(batch("a", seed) for seed in range(6)), OptimStep(model_id="a", adam=ADAM)]
    compute, numbers, overlapped = engine.compute, count(1), []

    def when_the_others_are_done(prepared: Prepared) -> Any:
        number = next(numbers)
        if (number == len(commands) or trace.wait_for("prepare", number + 1)) and (
            number == 1 or trace.wait_for("deliver", number - 1)
        ):
            overlapped.append(number)
        return compute(prepared)

    monkeypatch.setattr(engine, "compute", when_the_others_are_done)
    with serving(engine, trace) as client:
        client.run(*commands)
    assert overlapped == list(range(1, len(commands) + 1))


def test_what_arrives_while_a_step_computes_shares_the_next_to_be_prepared(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, trace, released = new_engine(), WatchedTrace(), threading.Event()
    compute, steps = engine.compute, []

    def held(prepared: Prepared) -> Any:
        assert released.wait(PATIENCE_S)
        steps.append(len(prepared.commands))
        return compute(prepared)

    with serving(engine, trace) as client:
        created = client.run(*(new_model(model_id) for model_id in "abcd"))
        monkeypatch.setattr(engine, "compute", held)
        numbers = []
        for step, model_ids in enumerate(("a", "a", "abcd"), start=len(created) + 1):
            numbers += client.send(*(batch(model_id) for model_id in model_ids))
            assert step > len(created) + 2 or trace.wait_for("prepare", step)
        released.set()
        client.get(numbers)
    assert steps == [1, 1, 4]


def test_an_optim_step_follows_its_forward_backward(new_engine: NewEngine) -> None:
    """In the trace nothing computes between them, deep as the queue may be."""
    engine, trace = new_engine(), Trace()
    with serving(engine, trace) as client:
        client.run(new_model("a"))
        client.run(*[batch("a"), OptimStep(model_id="a", adam=ADAM)] * 5)
    names = [span.name for span in trace.spans() if span.stage == "compute"]
    assert names == ["CreateModel", *["ForwardBackward", "OptimStep"] * 5]


def test_results_of_a_model_come_in_order(new_engine: NewEngine) -> None:
    with serving(new_engine(max_batch_tokens=32)) as client:
        client.run(*(new_model(model_id) for model_id in "abc"))
        numbers: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        for seed in range(10):
            for model_id in numbers:
                numbers[model_id] += client.send(batch(model_id, seed), OptimStep(model_id=model_id, adam=ADAM))
        client.get([number for each in numbers.values() for number in each])
        for each in numbers.values():
            assert [number for number in client.order if number in each] == each


def test_sixty_four_clients_at_once_get_what_one_gets(new_engine: NewEngine) -> None:
    engine, alone = new_engine(), new_engine()
    ids = [f"m{number}" for number in range(64)]
    with serving(engine) as client:
        client.run(*(new_model(model_id) for model_id in ids))
        rounds = []
        for seed in range(3):
            for model_id in ids:
                rounds += client.send(batch(model_id, seed), OptimStep(model_id=model_id, adam=ADAM))
        results = client.get(rounds)
    alone.run(new_model("m"))
    for seed in range(3):
        expected = alone.run(batch("m", seed))
        norm = alone.run(OptimStep(model_id="m", adam=ADAM))
        for place in range(64):
            forward, optim = results[2 * (64 * seed + place) :][:2]
            np.testing.assert_allclose(floats(forward.logprobs), floats(expected.logprobs), rtol=1e-3, atol=1e-4)
            assert optim.grad_norm == pytest.approx(norm.grad_norm, rel=1e-2)
            assert optim.step == seed + 1


def test_each_step_is_reported(new_engine: NewEngine) -> None:
    engine = new_engine()
    with serving(engine) as client:
        client.run(new_model("a"), batch("a"), OptimStep(model_id="a", adam=ADAM))
        client.run(new_model("b"))  # after it, the reports of what came before have arrived
        info, *reports = client.news
    assert info == engine.base.info()
    assert [type(report) for report in reports] == [StepReport]
    assert (reports[0].num_requests, reports[0].num_tokens) == (1, 10)
    assert reports[0].peak_bytes > 2**20


def test_an_unexpected_error_is_told_and_the_loop_goes_on(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine()
    with serving(engine) as client:
        client.run(new_model("a"))
        with monkeypatch.context() as patch:
            patch.setattr(engine.models, "create", lambda *_: 1 / 0)
            (failed,) = client.run(new_model("b"))
        assert failed == Failed("InternalError", "ZeroDivisionError: division by zero")
        assert isinstance(client.run(batch("a"))[0], ForwardResult)


def outcome(engine: Engine, command: AnyCommand) -> Any:
    try:
        return engine.run(command)
    except XorlError as error:
        return Failed(type(error).__name__, str(error))


def assert_alike(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected), (actual, expected)
    match actual:
        case ForwardResult():
            np.testing.assert_allclose(floats(actual.logprobs), floats(expected.logprobs), rtol=1e-3, atol=1e-3)
            assert actual.metrics == pytest.approx(expected.metrics, rel=1e-2, abs=1e-2)
        case OptimStepResult():
            assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2, abs=1e-4)
            assert actual.step == expected.step
        case Failed():
            assert actual.error == expected.error
            assert actual.message.partition(";")[0] == expected.message.partition(";")[0] or "nan" in actual.message
        case _:
            assert actual == expected


def test_any_interleaving_equals_one_request_at_a_time(new_engine: NewEngine) -> None:
    """Random commands of three models, collected at random moments: each result is that of a sequential engine."""
    engine = new_engine(max_batch_tokens=24, max_resident_adapters=2)
    sequential = new_engine()
    generations = count()
    with serving(engine) as client:

        class Interleavings(RuleBasedStateMachine):
            def __init__(self) -> None:
                super().__init__()
                generation = next(generations)
                self.ids = [f"{generation}-{name}" for name in "abc"]
                self.sent: list[tuple[int, AnyCommand]] = []
                for model_id in self.ids:
                    self.send(new_model(model_id))

            def send(self, command: AnyCommand) -> None:
                self.sent += [(number, command) for number in client.send(command)]

            @rule(which=st.integers(0, 2), seed=st.integers(0, 3), backward=st.booleans())
            def forward(self, which: int, seed: int, backward: bool) -> None:
                data = some_datums(seed, (5, 1, 12)[: 1 + seed])
                model_id = self.ids[which]
                if backward:
                    self.send(
                        ForwardBackward(model_id=model_id, datums=data, loss=CrossEntropy(), token_mean=seed % 2 == 0)
                    )
                else:
                    self.send(Forward(model_id=model_id, datums=data, loss=CrossEntropy()))

            @rule(which=st.integers(0, 2))
            def poisoned(self, which: int) -> None:
                inputs = {"logprobs": [np.full(4, -300.0)], "advantages": [-np.ones(4)]}
                data = datums(random_sequences(np.random.default_rng(0), (4,)), **inputs)
                self.send(ForwardBackward(model_id=self.ids[which], datums=data, loss=Ppo(), token_mean=True))

            @rule(which=st.integers(0, 2))
            def optim_step(self, which: int) -> None:
                self.send(OptimStep(model_id=self.ids[which], adam=AdamParams(learning_rate=1e-3)))

            @rule(which=st.integers(0, 2))
            def start_again(self, which: int) -> None:
                self.send(UnloadModel(model_id=self.ids[which]))
                self.send(new_model(self.ids[which]))

            @rule(command=st.sampled_from([Sleep(), WakeUp()]))
            def everybody(self, command: AnyCommand) -> None:
                self.send(command)
                self.send(WakeUp())

            @rule()
            def collect(self) -> None:
                client.get([number for number, _ in self.sent])

            def teardown(self) -> None:
                for model_id in self.ids:
                    self.send(UnloadModel(model_id=model_id))
                results = client.get([number for number, _ in self.sent])
                for (_, command), result in zip(self.sent, results, strict=True):
                    assert_alike(result, outcome(sequential, command))

        run_state_machine_as_test(
            Interleavings,
            settings=settings(
                max_examples=25,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
            ),
        )
