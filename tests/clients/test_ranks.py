"""Two engine processes behind one server, as a client sees them: nothing else than one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xorl_client
from xorl_client import types

from builders import random_sequences
from processes import TORCHRUN, XORL, running


def trained(url: str, model: str, model_id: str) -> list[list[float]]:
    """Log-probabilities of all tokens before each of three steps on the same datums."""
    sequences = random_sequences(np.random.default_rng(0), (6, 11, 3, 9))
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])},
        )
        for tokens in map(list, sequences)
    ]
    steps: list[list[float]] = []
    with xorl_client.ServiceClient(base_url=url) as service:
        client = service.create_lora_training_client(model, rank=4, alpha=8, model_id=model_id)
        for _ in range(3):
            outputs = client.forward_backward(data, "cross_entropy").result().loss_fn_outputs
            steps.append([value for entry in outputs for value in entry["logprobs"].tolist()])
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
