"""Times the competitors of one question side by side."""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.plot import draw

L2_FLUSH_BYTES = 256 * 2**20  # several times the cache of an H200 (60 MB) or a B200 (126 MB)
RATE_TRIALS = 10


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told on its command line."""

    device: torch.device
    rounds: int
    small: bool
    json: Path | None
    png: Path | None = None


@dataclass(frozen=True)
class Result:
    """One competitor on one case. Times are of one call; `peak_bytes` is known on CUDA only."""

    case: str
    name: str
    median_s: float
    spread_s: float  # between the quartiles
    floor_s: float
    peak_bytes: int | None
    ceiling: str = ""  # what the floor comes from, with its unit


def options(description: str, arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=20, help="how often each competitor runs")
    parser.add_argument("--small", action="store_true", help="the smallest sizes, twice: does it run at all?")
    parser.add_argument("--json", type=Path, help="write one line a result here, after a line on the machine")
    parser.add_argument("--png", type=Path, help="draw how near to its ceiling each competitor came")
    parsed = parser.parse_args(arguments)
    rounds = 2 if parsed.small else parsed.rounds
    return Options(torch.device(parsed.device), rounds, parsed.small, parsed.json, parsed.png)


def compare(
    case: str,
    competitors: Mapping[str, Callable[[], object]],
    floors_s: Mapping[str, float] | str,
    options: Options,
    ceiling: str = "",
    prepare: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Run the competitors in turn, round after round, so that what slows the machine slows them all.

    Args:
        floors_s: the least time of each in seconds; or the competitor whose median is the floor of all.
        ceiling: what the floors come from, with its unit; by default that competitor.
        prepare: runs before each trial, untimed.
    """
    for run in competitors.values():
        for _ in range(2):
            prepare()
            run()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    gc.collect()
    for _ in range(options.rounds):
        for name, run in competitors.items():
            prepare()
            seconds[name].append(_time(run, options.device))
    medians_s = {name: statistics.median(times) for name, times in seconds.items()}
    if isinstance(floors_s, str):
        ceiling = ceiling or floors_s
        floors_s = dict.fromkeys(competitors, medians_s[floors_s])
    return [
        Result(
            case,
            name,
            medians_s[name],
            _quartile_range(seconds[name]),
            floors_s[name],
            _peak_bytes(run, prepare) if options.device.type == "cuda" else None,
            ceiling,
        )
        for name, run in competitors.items()
    ]


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: of the host on the CPU, between events on CUDA."""
    if device.type == "cuda":
        return _time_on_cuda(run, device)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_cuda(run: Callable[[], object], device: torch.device) -> float:
    """The inputs come from memory, not from the L2 cache that the last trial left.

    While the flush runs, the host launches ahead: only a call whose launches outlast its work is charged for them.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    _flush_buffer(device).zero_()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)


def _quartile_range(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def _peak_bytes(run: Callable[[], object], prepare: Callable[[], object]) -> int:
    """Memory that a call needs at its worst, on top of what is there before it."""
    prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square product of random matrices: the ceiling of arithmetic.

    Measure it beside each case: a GPU's clock follows its temperature.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_s(lambda: torch.mm(a, b), device)


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second, read and written, of a copy on the device of that many: the ceiling of memory."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_s(lambda: target.copy_(source), device)


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    run()
    return min(_time(run, device) for _ in range(RATE_TRIALS))


def machine(device: torch.device) -> dict[str, str | int]:
    """The line that heads a file of results: without it they mean nothing."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else "",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(title: str, results: Sequence[Result], options: Options) -> None:
    """Print a table; write JSON lines and a picture where asked."""
    table = Table(title=title, caption=" · ".join(str(value) for value in machine(options.device).values() if value))
    for column in ("case", "competitor"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "IQR ms", "floor ms", "to floor", "peak MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        times = [_milliseconds(seconds) for seconds in (r.median_s, r.spread_s, r.floor_s)]
        peak = "?" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f}"
        table.add_row(r.case, r.name, *times, f"{r.median_s / r.floor_s:.2f}", peak)
    console = Console(width=130)
    console.print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = [machine(options.device), *map(asdict, results)]
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if options.png is not None:
        if find_spec("matplotlib") is None:
            console.print(f"{options.png} is not drawn: matplotlib is missing")
        else:
            draw(title, results, options.png)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{1 if seconds >= 0.01 else 3}f}"
