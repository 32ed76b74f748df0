"""The processes of several ranks: they answer as one, and end as one."""

import asyncio
from pathlib import Path

import pytest

from builders import config_for, request
from xorl.engine.client import EngineClient
from xorl.engine.commands import CreateModel, OptimStep
from xorl.errors import EngineLost
from xorl.types import AdamParams, CrossEntropy, LoraSpec

PATIENCE_S = 100


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_engine_and_is_named(tiny_model: Path, tmp_path: Path, dead: int) -> None:
    async def scenario() -> None:
        client = EngineClient(config_for(model=str(tiny_model), output_dir=str(tmp_path), gpus=2))
        await client.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                while client.state == "starting":
                    await asyncio.sleep(0.05)
                await client.submit(CreateModel(model_id="m", lora=LoraSpec(rank=2)))
                for number in range(3):
                    done = client.submit(request("m", CrossEntropy(), number))
                    stepped = client.submit(OptimStep(model_id="m", adam=AdamParams()))
                    assert (await done).metrics["valid_tokens:sum"] > 0
                    assert (await stepped).step == number + 1
                waiting = [client.submit(request("m", CrossEntropy(), number)) for number in range(200)]
                client._processes[dead].kill()
                with pytest.raises(EngineLost, match=f"rank {dead} .*exit code -9"):
                    await asyncio.gather(*waiting)
                assert client.state == "dead"
                await asyncio.gather(*(process.wait() for process in client._processes))
        finally:
            await client.stop()

    asyncio.run(scenario())
