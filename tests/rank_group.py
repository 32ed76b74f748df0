"""Engines of several ranks, each in a process of its own."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from builders import config_for
from processes import free_port
from xorl.engine.commands import AnyCommand, AnyResult
from xorl.engine.engine import Engine
from xorl.engine.parallel import whole
from xorl.engine.ranks import join

PATIENCE_S = 40

Outcome = AnyResult | Exception


class Pool:
    """Starts ranks as forks of a process that has imported everything and done nothing yet."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["rank_group"])
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # by which it finds this module

    @contextmanager
    def engine(self, size: int, directory: Path, **settings: object) -> Iterator["Group"]:
        """An engine of `size` ranks, by its settings."""
        pipes = [self._context.Pipe() for _ in range(size)]
        processes = [self._context.Process(target=_work, args=[theirs], daemon=True) for _, theirs in pipes]
        for process in processes:
            process.start()
        group = Group([ours for ours, _ in pipes])
        try:
            group.each(_begin, [(rank, size, group.port, directory, settings) for rank in range(size)])
            yield group
        finally:
            for process in processes:
                process.kill()
                process.join()


class Group:
    """The ranks of one engine; all do what one is asked."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self.port = free_port()

    def each(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function of this module in every rank, on its engine; each one's result."""
        for connection, own in zip(self._connections, arguments, strict=True):
            connection.send((function, own))
        answers = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(PATIENCE_S), f"rank {rank} is stuck in {function.__name__}{arguments[rank]}"
            answers.append(connection.recv())
        for answer in answers:
            if isinstance(answer, Broken):
                raise AssertionError(f"{function.__name__} failed:\n{answer.traceback}")
        return answers

    def all(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self.each(function, [arguments] * len(self._connections))

    def step(self, *commands: AnyCommand) -> list[Outcome]:
        """Run commands as one step; every rank must say the same of each, and the results are the first one's."""
        outcomes = self.all(_step, *commands)
        for others in outcomes[1:]:
            assert [type(each) for each in others] == [type(each) for each in outcomes[0]]
        return outcomes[0]

    def run(self, command: AnyCommand) -> Any:
        (outcome,) = self.step(command)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def weights(self, model_id: str) -> dict[str, np.ndarray]:
        """Which are to be the same on all ranks, to the bit."""
        first, *others = self.all(_weights, model_id)
        for other in others:
            for name, weight in first.items():
                np.testing.assert_array_equal(other[name], weight, err_msg=name)
        return first

    def gradients(self, model_id: str) -> dict[str, np.ndarray]:
        """Those of all ranks together."""
        each = self.all(_gradients, model_id)
        return {name: sum(gradients[name] for gradients in each) for name in each[0]}


class Broken(NamedTuple):
    traceback: str


class _Rank:
    engine: Engine | None = None


def _work(connection: Connection) -> None:
    torch.set_num_threads(1)
    rank = _Rank()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = function(rank, *arguments)
        except Exception:  # which the test is to see
            answer = Broken(traceback.format_exc())
        connection.send(answer)


def _begin(own: _Rank, rank: int, size: int, port: int, directory: Path, settings: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own.engine = Engine(config_for(**settings), directory / f"evicted-{rank}", join())


def _step(own: _Rank, *commands: AnyCommand) -> list[Outcome]:
    assert own.engine
    outcomes: list[Outcome] = []
    for outcome in own.engine.compute(own.engine.prepare(commands)):
        try:
            outcomes.append(outcome())
        except Exception as error:  # one command's failure is its own
            outcomes.append(error)
    return outcomes


def _weights(own: _Rank, model_id: str) -> dict[str, np.ndarray]:
    assert own.engine
    parameters = own.engine.models[model_id].parameters
    return {name: whole(parameter).detach().numpy() for name, parameter in parameters.items()}


def _gradients(own: _Rank, model_id: str) -> dict[str, np.ndarray]:
    """A sharded one is already the sum; the first rank answers for it."""
    assert own.engine
    is_first = own.engine.base.ranks.is_first
    gradients = own.engine.models[model_id].gradients()
    return {
        name: whole(gradient).numpy() * (is_first or whole(gradient) is gradient)
        for name, gradient in gradients.items()
    }


def set_b(own: _Rank, model_id: str, seed: int) -> None:
    """Fill the adapter's B, which starts at zero."""
    assert own.engine
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in own.engine.models[model_id].parameters.items():
        if name.endswith("lora_B"):
            parameter.normal_(std=0.05, generator=generator)


def starve(own: _Rank, starved: int, most_tokens: int) -> None:
    """From now on batches of more tokens find no memory, on one rank."""
    assert own.engine
    hidden_states = own.engine.base.hidden_states

    def scarce(tokens_T: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(tokens_T) > most_tokens:
            raise torch.OutOfMemoryError("injected")
        return hidden_states(tokens_T, *others)

    if own.engine.base.ranks.rank == starved:
        own.engine.base.hidden_states = scarce
