from pathlib import Path

import pytest

pytest.importorskip("xorl_client")
pytest.importorskip("matplotlib")

from xorl.demo.report import Report
from xorl.demo.rl import StepReport


@pytest.mark.parametrize("num_steps", [1, 3, 30])
def test_the_end_shows_both_accuracies_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str], num_steps: int):
    with Report("a model", num_steps, tmp_path) as report:
        report.add(0.25)
        for step in range(1, num_steps + 1):
            report.add(
                StepReport(
                    step, reward=step / num_steps, kl=0.0, grad_norm=1.0, rollout_s=1.0, update_s=2.0, sync_s=0.5
                )
            )
        report.add(0.75)
        report.finish(12.0)
    shown = capsys.readouterr().out
    assert "0.25 before, 0.75 after" in shown
    assert f"{num_steps} steps in 12 s" in shown
    assert (tmp_path / "rewards.png").exists()
