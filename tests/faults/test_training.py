"""What is being trained, when the servers that it is synced into die."""

from pathlib import Path
from signal import SIGKILL

import pytest

from builders import config_for, request, sync_into
from faults.mortal import BUCKET, Fault, Moment, servers
from xorl.engine.commands import CreateModel, OptimStep
from xorl.engine.engine import Engine
from xorl.types import AdamParams, CrossEntropy, LoraSpec

LOSS = CrossEntropy()
STEP = OptimStep(model_id="m", adam=AdamParams(learning_rate=1e-2))


def engine(model: Path, folder: Path) -> Engine:
    """One with a model that has moments from a step, and the gradient of half a batch."""
    engine = Engine(config_for(model=str(model), output_dir=str(folder), sync_timeout_s=3.0), folder / "evicted")
    engine.run(CreateModel(model_id="m", lora=LoraSpec(rank=4, seed=1)))
    for command in (request("m", LOSS, 1), STEP, request("m", LOSS, 2)):
        engine.run(command)
    return engine


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_lost_endpoint_leaves_gradient_and_moments_as_they_were(
    tiny_model: Path, tmp_path: Path, moment: Moment
) -> None:
    alone, synced = engine(tiny_model, tmp_path / "alone"), engine(tiny_model, tmp_path / "synced")
    with servers(1) as (server,):
        server.inject(Fault(SIGKILL, moment, BUCKET, 1))
        (endpoint,) = synced.run(sync_into(server.port, model_id="m")).endpoints
        assert not endpoint.success
    rest = request("m", LOSS, 3), STEP, request("m", LOSS, 4, backward=False)
    assert [synced.run(command) for command in rest] == [alone.run(command) for command in rest]
    for each in (alone, synced):
        each.close()
