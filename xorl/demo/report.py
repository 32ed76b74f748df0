"""Shows a training run as it goes, and its table and plot at the end."""

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from xorl.demo.plot import plot_rewards
from xorl.demo.rl import StepReport, mean

ROWS = 10


class Report:
    def __init__(self, model: str, steps: int, output: Path) -> None:
        self._model = model
        self._output = output
        self._accuracies: list[float] = []
        self._steps: list[StepReport] = []
        self._console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task(f"starting the servers for {model}", total=steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def add(self, event: StepReport | float) -> None:
        if isinstance(event, StepReport):
            self._steps.append(event)
            self._progress.console.print(
                f"step {event.step:3}  reward {event.reward:.2f}  KL {event.kl:+.0e}  "
                f"rollout {event.rollout_s:.1f} s  update {event.update_s:.1f} s  sync {event.sync_s:.1f} s"
            )
            self._progress.update(self._task, description="training", completed=event.step)
        else:
            self._accuracies.append(event)
            self._progress.console.print(f"held-out accuracy {event:.2f}")

    def finish(self, seconds: float) -> None:
        """Print the table and write `rewards.png`."""
        self._progress.stop()
        rewards = [step.reward for step in self._steps]
        table = Table("steps", "mean reward", title=f"{self._model}: reward by training step")
        size = max(1, len(rewards) // ROWS)
        for first in range(0, len(rewards), size):
            part = rewards[first : first + size]
            table.add_row(f"{first + 1}-{first + len(part)}", f"{mean(part):.2f}  " + "█" * round(40 * mean(part)))
        before, after = self._accuracies[0], self._accuracies[-1]
        path = self._output / "rewards.png"
        plot_rewards(rewards, f"{self._model}, sums below twenty", path)
        self._console.print(table)
        self._console.print(f"held-out accuracy (greedy): {before:.2f} before, {after:.2f} after")
        self._console.print(f"{len(rewards)} steps in {seconds:.0f} s, servers' start included; plot: {path}")
