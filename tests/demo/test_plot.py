from pathlib import Path

import pytest

from xorl.demo.plot import plot_rewards

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("rewards", [[0.5], [0.1, 0.4, 0.3, 0.7, 0.9, 1.0, 1.0]])
def test_a_png_is_written(tmp_path: Path, rewards: list[float]):
    path = tmp_path / "rewards.png"
    plot_rewards(rewards, "a model", path)
    assert path.read_bytes().startswith(b"\x89PNG")
