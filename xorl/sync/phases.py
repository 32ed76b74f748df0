"""Measures what a sync spends its time on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

Phase = str
"""probe, pause, connect, transfer, disk, commit, verify, resume and total follow or contain one another on the clock.

Within transfer: `produce` is the making of buckets; `broadcast` the time that one was on its way, until the wire was
free or all had loaded it; `load` what was then still waited for; `hidden` the part of produce that fell into the two.
"""


class Span(NamedTuple):
    """From one reading of the clock to another."""

    start: float
    stop: float

    def common(self, other: "Span") -> float:
        return max(0.0, min(self.stop, other.stop) - max(self.start, other.start))


class Phases:
    """Seconds spent, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = {}

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def add(self, phase: Phase, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
