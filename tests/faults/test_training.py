"""What is being trained, when the servers that it is synced into die."""

from pathlib import Path
from signal import SIGKILL

import pytest

from builders import config_for, request
from faults.mortal import BUCKET, Fault, Moment, servers
from xorl.engine.commands import CreateModel, Endpoint, OptimStep, SyncWeights
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


def sync_into(port: int) -> SyncWeights:
    return SyncWeights(
        model_id="m",
        endpoints=[Endpoint("127.0.0.1", port)],
        master_address="127.0.0.1",
        master_port=0,
        group_name="weights",
        bucket_bytes=10_000,
        flush_cache=False,
        cache_mode="auto",
        pause_mode="retract",
        weight_version="1",
        quantization=None,
    )


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_lost_endpoint_leaves_gradient_and_moments_as_they_were(
    tiny_model: Path, tmp_path: Path, moment: Moment
) -> None:
    alone, synced = engine(tiny_model, tmp_path / "alone"), engine(tiny_model, tmp_path / "synced")
    with servers(1) as (server,):
        server.inject(Fault(SIGKILL, moment, BUCKET, 1))
        (endpoint,) = synced.run(sync_into(server.port)).endpoints
        assert not endpoint.success
    rest = request("m", LOSS, 3), STEP, request("m", LOSS, 4, backward=False)
    assert [synced.run(command) for command in rest] == [alone.run(command) for command in rest]
    for each in (alone, synced):
        each.close()
