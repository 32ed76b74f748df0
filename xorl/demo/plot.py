"""Draws the reward of each training step."""

from collections.abc import Sequence
from pathlib import Path

WINDOW = 5


def plot_rewards(rewards: Sequence[float], title: str, path: Path) -> None:
    """Write a PNG: the mean reward of each step's rollouts, and their running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(rewards) + 1)
    running = [sum(rewards[max(0, i - WINDOW) : i]) / min(i, WINDOW) for i in steps]
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    axes.plot(steps, rewards, "o", markersize=3, alpha=0.4, label="mean reward of the step's rollouts")
    axes.plot(steps, running, label=f"mean of the last {WINDOW} steps")
    axes.set(xlabel="training step", ylabel="reward", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
