"""Who waits how long for the engine? `python -m bench.schedule [--arrivals FILE]`

Replays requests against the engine's scheduler and two that know no models: first come first served in shared
batches, and one request at a time. Time is simulated: a step takes an overhead and its tokens over a rate, the next
one is picked when it begins. Synthetic arrivals come from 1 to 1,000 tenants, one in eight of whom sends large
batches without end; FILE has recorded ones, a JSON object a line: time (seconds), model_id, tokens, kind.
"""

import argparse
import heapq
import json
import random
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.table import Table

from xorl.engine.scheduler import Scheduler, Work

BUDGET = 8192  # the engine's default
QUANTUM = BUDGET // 16
OVERHEAD_S = 0.02  # of a step: launches, and reading the weights once
TOKENS_PER_S = 26_000  # Qwen3-8B with LoRA on an H200, without the overhead
OPTIM_TOKENS = 64
LOAD = 1.5  # offered over capacity: fairness shows when there is not enough
BULK_SHARE = 8  # one tenant in so many sends large batches
SMALL_TOKENS, BULK_TOKENS = 256, 4096
TENANTS = (1, 4, 16, 64, 250, 1000)


class Arrival(NamedTuple):
    time: float
    model_id: str
    tokens: int
    kind: str  # forward_backward, forward, optim_step, or anything else that runs alone


class Done(NamedTuple):
    arrival: Arrival
    stop: float

    @property
    def latency(self) -> float:
        return self.stop - self.arrival.time


class Policy(Protocol):
    def add(self, arrival: Arrival) -> None: ...

    def next(self) -> list[Arrival]:
        """The requests of the next step; empty when nothing waits."""
        ...


class Fair:
    """The engine's."""

    def __init__(self) -> None:
        self._scheduler: Scheduler[Arrival] = Scheduler(QUANTUM)

    def add(self, arrival: Arrival) -> None:
        self._scheduler.add(arrival.model_id, Work(arrival, _cost(arrival), _shares(arrival)))

    def next(self) -> list[Arrival]:
        return self._scheduler.next(BUDGET, BUDGET)


class FirstCome:
    """A queue; what is next to each other in it shares a step, if it is of one kind and within the budget."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._waiting: deque[Arrival] = deque()

    def add(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)

    def next(self) -> list[Arrival]:
        step: list[Arrival] = []
        left = self._budget
        while self._waiting:
            first = self._waiting[0]
            shares = _shares(first)
            if step and (shares is None or shares != _shares(step[0]) or _cost(first) > left):
                break
            left -= _cost(first)
            step.append(self._waiting.popleft())
        return step


def policies() -> Mapping[str, Policy]:
    return {"xorl": Fair(), "first come first served": FirstCome(BUDGET), "one request at a time": FirstCome(1)}


def _cost(arrival: Arrival) -> int:
    return arrival.tokens or OPTIM_TOKENS


def _shares(arrival: Arrival) -> str | None:
    if arrival.kind in ("forward_backward", "forward"):
        return "forward"
    return arrival.kind if arrival.kind == "optim_step" else None


def simulate(arrivals: Iterable[Arrival], policy: Policy) -> list[Done]:
    """Run until everything is done."""
    coming = deque(sorted(arrivals, key=lambda arrival: arrival.time))
    done: list[Done] = []
    free_at = now = 0.0
    while True:
        while coming and coming[0].time <= now:
            policy.add(coming.popleft())
        step = policy.next()
        if not step:
            if not coming:
                return done
            now = coming[0].time
            continue
        start = max(now, free_at)
        free_at = start + OVERHEAD_S + sum(_cost(arrival) for arrival in step) / TOKENS_PER_S
        done += [Done(arrival, free_at) for arrival in step]
        now = max(now, start)  # the next is picked when this one begins


def synthetic(num_tenants: int, seconds: float, seed: int = 0) -> list[Arrival]:
    """Small tenants send a forward_backward and an optim_step now and then; the bulk ones a deep queue at the start."""
    rng = random.Random(seed)
    bulk = [f"bulk-{n}" for n in range(max(num_tenants // BULK_SHARE, 1))]
    small = [f"small-{n}" for n in range(num_tenants - len(bulk))]
    offered = LOAD * TOKENS_PER_S * seconds
    small_tokens = min(offered / 4, len(small) * SMALL_TOKENS * seconds)
    rate = small_tokens / seconds / SMALL_TOKENS / len(small) if small else 0.0
    arrivals = []
    for model_id in small:
        time = rng.expovariate(rate)
        while time < seconds:
            tokens = max(int(rng.expovariate(1 / SMALL_TOKENS)), 1)
            arrivals += [Arrival(time, model_id, tokens, "forward_backward"), Arrival(time, model_id, 0, "optim_step")]
            time += rng.expovariate(rate)
    for position in range(int((offered - small_tokens) / BULK_TOKENS)):
        model_id = bulk[position % len(bulk)] if position % 3 else bulk[0]  # the first sends more than the others
        arrivals.append(Arrival(0.0, model_id, BULK_TOKENS, "forward_backward"))
    return arrivals


def recorded(path: Path) -> list[Arrival]:
    lines = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return [Arrival(float(x["time"]), str(x["model_id"]), int(x["tokens"]), str(x["kind"])) for x in lines]


class Outcome(NamedTuple):
    """Latencies are of the smaller half of requests with tokens, in seconds."""

    tenants: int
    policy: str
    p50_s: float
    p99_s: float
    tokens_per_s: float
    jain: float  # 1: everybody had his fair part, 1 / tenants: one had everything


def measure(arrivals: Sequence[Arrival], name: str, policy: Policy, seconds: float) -> Outcome:
    done = simulate(arrivals, policy)
    sizes = sorted(arrival.tokens for arrival in arrivals if arrival.tokens)
    small = [one.latency for one in done if 0 < one.arrival.tokens <= sizes[len(sizes) // 2]]
    cuts = statistics.quantiles(small, n=100, method="inclusive") if len(small) > 1 else small * 99
    total = sum(one.arrival.tokens for one in done)
    return Outcome(
        tenants=len({arrival.model_id for arrival in arrivals}),
        policy=name,
        p50_s=cuts[49],
        p99_s=cuts[98],
        tokens_per_s=total / max(one.stop for one in done),
        jain=fairness(arrivals, [one for one in done if one.stop <= seconds]),
    )


def fairness(arrivals: Sequence[Arrival], done: Sequence[Done]) -> float:
    """Jain's index of what each model got, over its part by max-min fairness of what all got together."""
    wanted: Counter[str] = Counter()
    got: Counter[str] = Counter()
    for arrival in arrivals:
        wanted[arrival.model_id] += _cost(arrival)
    for one in done:
        got[one.arrival.model_id] += _cost(one.arrival)
    parts = max_min(wanted, sum(got.values()))
    ratios = [got[model_id] / part for model_id, part in parts.items() if part]
    squares = sum(ratio**2 for ratio in ratios)
    return sum(ratios) ** 2 / (len(ratios) * squares) if squares else 1.0


def max_min(wanted: Mapping[str, float], total: float) -> dict[str, float]:
    """Everybody gets the same, but nobody more than he wants."""
    parts: dict[str, float] = {}
    smallest_first = [(want, model_id) for model_id, want in wanted.items()]
    heapq.heapify(smallest_first)
    while smallest_first:
        want, model_id = heapq.heappop(smallest_first)
        parts[model_id] = min(want, total / (len(smallest_first) + 1))
        total -= parts[model_id]
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrivals", type=Path, help="recorded requests, JSON lines; else synthetic ones")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long synthetic requests arrive")
    parser.add_argument("--small", action="store_true", help="few tenants, few seconds: does it run at all?")
    parser.add_argument("--json", type=Path, help="write one line an outcome here")
    parser.add_argument("--png", type=Path, help="draw latency, throughput and fairness over the tenants")
    chosen = parser.parse_args(arguments)
    outcomes = list(_outcomes(chosen.arrivals, 2.0 if chosen.small else chosen.seconds, chosen.small))
    table = Table(title="scheduler, simulated")
    for column in ("tenants", "policy", "p50 s", "p99 s", "tokens/s", "Jain"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for o in outcomes:
        table.add_row(
            str(o.tenants), o.policy, f"{o.p50_s:.3f}", f"{o.p99_s:.3f}", f"{o.tokens_per_s:,.0f}", f"{o.jain:.3f}"
        )
    Console(width=100).print(table)
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text("".join(json.dumps(outcome._asdict()) + "\n" for outcome in outcomes))
    if chosen.png is not None:
        _draw(outcomes, chosen.png)


def _outcomes(path: Path | None, seconds: float, small: bool) -> Iterator[Outcome]:
    if path is not None:
        arrivals = recorded(path)
        horizon = max(arrival.time for arrival in arrivals)
        cases = [(arrivals, horizon)]
    else:
        cases = [(synthetic(count, seconds), seconds) for count in (TENANTS[:3] if small else TENANTS)]
    for arrivals, horizon in cases:
        for name, policy in policies().items():
            yield measure(arrivals, name, policy, horizon)


def _draw(outcomes: Sequence[Outcome], path: Path) -> None:
    if find_spec("matplotlib") is None:
        print(f"{path} is not drawn: matplotlib is missing")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_policy: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_policy[outcome.policy].append(outcome)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), dpi=110)
    for policy, line in by_policy.items():
        tenants = [o.tenants for o in line]
        (drawn,) = axes[0].plot(tenants, [o.p50_s for o in line], marker=".", label=policy)
        axes[0].plot(tenants, [o.p99_s for o in line], marker=".", linestyle=":", color=drawn.get_color())
        axes[1].plot(tenants, [o.tokens_per_s for o in line], marker=".")
        axes[2].plot(tenants, [o.jain for o in line], marker=".")
    titles = ("latency of small requests, s: p50, p99 dotted", "tokens/s", "Jain's fairness index")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xscale="log", xlabel="tenants", title=title)
    axes[0].set_yscale("log")
    figure.legend(loc="outside lower center", ncols=3)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
