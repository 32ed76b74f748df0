"""Two engine processes behind one server, as a client sees them: nothing else than one."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import xorl_client
from xorl_client import types

from clients.datums import data, logprobs
from processes import TORCHRUN, XORL, running


def trained(url: str, model: str, model_id: str) -> list[list[float]]:
    """Log-probabilities of all tokens before each of three steps on the same datums."""
    steps: list[list[float]] = []
    with xorl_client.ServiceClient(base_url=url) as service:
        client = service.create_lora_training_client(model, rank=4, alpha=8, model_id=model_id)
        for _ in range(3):
            output = client.forward_backward(data(lengths=(6, 11, 3, 9)), "cross_entropy").result()
            steps.append(list(chain(*logprobs(output))))
            client.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    return steps


@pytest.mark.parametrize(("command", "flags"), [(XORL, ["--gpus", "2"]), (TORCHRUN, [])], ids=["gpus", "torchrun"])
def test_two_ranks_train_as_one(
    trainer: str, tiny_model: Path, model_id: str, tmp_path: Path, command: Sequence[str], flags: Sequence[str]
) -> None:
    arguments = ("serve", "--model", str(tiny_model), "--output-dir", str(tmp_path / "output"), *flags)
    with running(tmp_path / "serve.log", *arguments, command=command) as url:
        steps = trained(url, tiny_model.name, model_id)
    alone = trained(trainer, tiny_model.name, model_id)
    assert steps[0] == pytest.approx(alone[0], rel=1e-4)  # no later one, since adapters begin at random
    assert sum(steps[0]) < sum(steps[1]) < sum(steps[2])
