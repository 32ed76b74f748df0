"""Every benchmark still runs, at its smallest."""

import importlib
import json

import pytest
import torch

torch.set_num_threads(1)

# those that take --small; each has a main(arguments)
NAMES = ["control_plane", "logprobs"]


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_says_where(name, tmp_path, capsys):
    lines = tmp_path / "results.jsonl"
    importlib.import_module(f"bench.{name}").main(["--small", "--json", str(lines)])
    header, *results = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {"device", "torch", "commit"} <= header.keys()
    assert results
    assert all(min(result["floor_s"], result["median_s"]) > 0 for result in results)
    assert "to floor" in capsys.readouterr().out
