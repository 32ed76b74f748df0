"""Endpoints that are really killed or stopped, before, during and after each phase of a sync.

Whatever happens to one of them, the other gets the whole update, nobody answers from a mixture of weights, the weights
here stay as they were, and the next sync takes both.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from signal import SIGKILL, SIGSTOP
from typing import get_args

import pytest
import torch

from builders import sync_into
from faults.conftest import Row
from faults.mortal import BUCKET, Fault, Moment, Server, servers, tensors
from xorl.engine.commands import SyncReport
from xorl.sync.formats import Weight
from xorl.sync.push import WeightSync

TIMEOUT_S = 3.0
HANGING_S = 12 * TIMEOUT_S
"""A sync that takes longer hangs: an endpoint that answers nothing may cost each phase a timeout, but no more."""

JOIN = "/init_weights_update_group"
PATHS = (
    "/server_info",
    "/pause_generation",
    JOIN,
    "/begin_weight_update",
    BUCKET,
    "/end_weight_update",
    "/update_weight_version",
    "/flush_cache",
    "/continue_generation",
)
FAULTS = [
    Fault(signal, moment, path, 2 if path == BUCKET else 0)
    for signal in (SIGKILL, SIGSTOP)
    for path in PATHS
    for moment in get_args(Moment)
]


def is_quick(fault: Fault) -> bool:
    """One that tells much for its time; what comes before a phase mostly comes after another."""
    if fault.signal == SIGKILL:
        return fault.moment == "during" or fault.path == BUCKET
    return (fault.moment, fault.path) in {("before", JOIN), ("during", BUCKET), ("before", "/flush_cache")}


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Server]]:
    with servers(2) as both:
        yield both


@pytest.fixture
def sync() -> Iterator[WeightSync]:
    sync = WeightSync(TIMEOUT_S, torch.device("cpu"))
    yield sync
    sync.close()


def weights(version: int) -> list[Weight]:
    return [Weight(name, tensor, tensor.dtype) for name, tensor in tensors(version).items()]


def push(
    sync: WeightSync, both: list[Server], trained: list[Weight], version: int, group_name: str = "weights"
) -> SyncReport:
    """The sync's report; fails if it hangs."""
    ports = [server.port for server in both]
    command = sync_into(*ports, group_name=group_name, bucket_bytes=4000, weight_version=f"v{version}")
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(sync.push, command, trained).result(HANGING_S)


@contextmanager
def watched(both: list[Server]) -> Iterator[None]:
    """Whoever answers meanwhile does so from the weights of one version."""
    done = threading.Event()
    answers: list[list[int] | str] = []

    def watch(server: Server) -> None:
        while not done.is_set():
            answers.append(server.served(timeout_s=0.2))

    with ThreadPoolExecutor(len(both)) as threads:
        watching = [threads.submit(watch, server) for server in both]
        try:
            yield
        finally:
            done.set()
        for each in watching:
            each.result()
    mixed = [answer for answer in answers if isinstance(answer, list) and len(answer) != 1]
    assert not mixed, f"answered from a mixture: {mixed}"


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=str(fault), marks=[] if is_quick(fault) else [pytest.mark.slow]) for fault in FAULTS],
)
def test_an_endpoint_that_is_lost(
    fault: Fault, pair: list[Server], sync: WeightSync, record: Callable[[Row], None]
) -> None:
    victim, other = pair
    assert all(line.success for line in push(sync, pair, weights(1), 1).endpoints)
    trained = weights(2)
    victim.inject(fault)
    with watched(pair):
        report = push(sync, pair, trained, 2, "another" if fault.path == JOIN else "weights")
        if fault.signal == SIGSTOP:
            victim.thaw()
    lost, kept = report.endpoints
    assert kept.success, kept.message
    assert other.served() == [2]
    afterwards = victim.served()
    allowed = {"SIGKILL": ["gone"], "SIGSTOP": ["paused", [1], [2]]}[fault.signal.name]
    assert afterwards in allowed
    if not lost.success:
        assert str(victim.port) in lost.message
    elif fault.signal == SIGSTOP:
        assert afterwards == [2], "a success is no guess"
    for weight, before in zip(trained, weights(2), strict=True):
        assert torch.equal(weight.tensor, before.tensor)
    if fault.signal == SIGKILL:
        victim.kill()
        victim.start()
    assert all(line.success for line in push(sync, pair, weights(3), 3).endpoints)
    assert victim.served() == other.served() == [3]
    record((str(fault), "success" if lost.success else "failure", str(afterwards), "[2]", "[3]"))
