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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told on its command line."""

    device: torch.device
    rounds: int
    small: bool
    json: Path | None


@dataclass(frozen=True)
class Result:
    """One competitor on one case. Times are of one call; `peak_bytes` is known on CUDA only."""

    case: str
    name: str
    median_s: float
    spread_s: float  # between the quartiles
    floor_s: float
    peak_bytes: int | None


def options(description: str, arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=20, help="how often each competitor runs")
    parser.add_argument("--small", action="store_true", help="the smallest sizes, twice: does it run at all?")
    parser.add_argument("--json", type=Path, help="write one line a result here, after a line on the machine")
    parsed = parser.parse_args(arguments)
    return Options(torch.device(parsed.device), 2 if parsed.small else parsed.rounds, parsed.small, parsed.json)


def compare(
    case: str, competitors: Mapping[str, Callable[[], object]], floors_s: Mapping[str, float], options: Options
) -> list[Result]:
    """Run the competitors in turn, round after round, so that what slows the machine slows them all."""
    for run in competitors.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    gc.collect()
    for _ in range(options.rounds):
        for name, run in competitors.items():
            seconds[name].append(_time(run, options.device))
    return [
        Result(
            case,
            name,
            statistics.median(seconds[name]),
            _quartile_range(seconds[name]),
            floors_s[name],
            _peak_bytes(run) if options.device.type == "cuda" else None,
        )
        for name, run in competitors.items()
    ]


def _time(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quartile_range(values: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def _peak_bytes(run: Callable[[], object]) -> int:
    """Memory that a call needs at its worst, on top of what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square product of random matrices: the ceiling beside which we stand."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(_time(lambda: torch.mm(a, b), device) for _ in range(10))


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
    """Print a table; write JSON lines where asked."""
    table = Table(title=title, caption=" · ".join(str(value) for value in machine(options.device).values() if value))
    for column in ("case", "competitor"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "IQR ms", "floor ms", "to floor", "peak MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        times = [f"{1e3 * seconds:.1f}" for seconds in (r.median_s, r.spread_s, r.floor_s)]
        peak = "?" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f}"
        table.add_row(r.case, r.name, *times, f"{r.median_s / r.floor_s:.2f}", peak)
    Console(width=110).print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = [machine(options.device), *map(asdict, results)]
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
