"""Records what each stage of the engine did when, and writes it as a Chrome trace."""

import json
import time
from collections import deque
from pathlib import Path
from typing import Literal, NamedTuple

Stage = Literal["prepare", "compute", "deliver"]
STAGES: tuple[Stage, ...] = ("prepare", "compute", "deliver")

MAX_SPANS = 100_000


class Span(NamedTuple):
    """One stage's work on one step; times in seconds of `time.perf_counter`."""

    stage: Stage
    step: int
    start: float
    stop: float
    name: str  # what the step does
    requests: int
    tokens: int
    peak_bytes: int  # 0 where it was not measured


class Trace:
    """The latest spans. All stages add to it, each from a thread of its own."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._origin = time.perf_counter()

    def add(self, span: Span) -> None:
        self._spans.append(span)

    def spans(self) -> list[Span]:
        """In the order in which they ended."""
        return list(self._spans)

    def write(self, path: Path) -> None:
        """As JSON for chrome://tracing or ui.perfetto.dev: a row for each stage."""
        rows = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": stage}}
            for row, stage in enumerate(STAGES)
        ]
        events = [
            {
                "ph": "X",
                "name": f"{span.name} {span.step}",
                "cat": span.stage,
                "pid": 0,
                "tid": STAGES.index(span.stage),
                "ts": 1e6 * (span.start - self._origin),
                "dur": 1e6 * (span.stop - span.start),
                "args": {"requests": span.requests, "tokens": span.tokens, "peak_bytes": span.peak_bytes},
            }
            for span in self.spans()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": rows + events}))
