"""Draws how much of its ceiling each competitor reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Result

BAR_INCHES = 0.16
COLOURS = "tab20"


def draw(title: str, results: Sequence[Result], path: Path) -> None:
    """Write a PNG: a group of bars a case, floor / median in percent; the line at 100% is the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(result.case for result in results))
    names = list(dict.fromkeys(result.name for result in results))
    colours = dict(zip(names, pyplot.get_cmap(COLOURS)([i % 20 for i in range(len(names))]), strict=True))
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + BAR_INCHES * (len(results) + len(cases) + len(names))), dpi=110)
    row, rows_of_cases = 0, []
    for case in cases:
        first = row
        for result in (result for result in results if result.case == case):
            percent = 100 * result.floor_s / result.median_s
            axes.barh(row, percent, color=colours[result.name], height=0.9)
            axes.text(percent, row, f" {percent:.0f}%", va="center", fontsize=6)
            row += 1
        rows_of_cases.append((first + row - 1) / 2)
        row += 1
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(rows_of_cases, [_label(case, results) for case in cases], fontsize=7)
    axes.set(ylim=(row - 0.5, -1), xlabel="achieved, % of the ceiling", title=title)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, fontsize=7, loc="outside lower center", ncols=min(4, len(names)))
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _label(case: str, results: Sequence[Result]) -> str:
    """The case above what its ceiling is, which may be a rate that differs from case to case."""
    ceiling = next(result.ceiling for result in results if result.case == case)
    return f"{case}\n{ceiling}" if ceiling else case
