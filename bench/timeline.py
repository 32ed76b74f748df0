"""Draws what the stages of the engine did when."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from xorl.engine.trace import STAGES, Span


def draw(runs: Mapping[str, Sequence[Span]], path: Path) -> None:
    """Write a PNG: a row for each stage of each run, all on one clock; the colours of a step's neighbours differ."""
    if find_spec("matplotlib") is None:
        print(f"{path} is not drawn: matplotlib is missing")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(runs), figsize=(11, 1.7 * len(runs)), dpi=110, sharex=True, squeeze=False)
    for axis, (name, spans) in zip(axes[:, 0], runs.items(), strict=True):
        origin = min(span.start for span in spans)
        for row, stage in enumerate(STAGES):
            bars = [(1e3 * (s.start - origin), 1e3 * (s.stop - s.start)) for s in spans if s.stage == stage]
            colours = [f"C{s.step % 6}" for s in spans if s.stage == stage]
            axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=colours)
        axis.set_yticks(range(len(STAGES)), STAGES)
        axis.set_title(name, fontsize=9)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("ms")
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
