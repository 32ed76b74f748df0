"""The engine in a process of its own, through its client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from builders import config_for, datums, random_sequences
from xorl.engine.client import EngineClient
from xorl.engine.commands import AnyCommand, CreateModel, Forward, ForwardBackward, OptimStep, Sleep, WakeUp
from xorl.errors import EngineLost, InvalidRequest, QueueFull, UnknownId
from xorl.types import AdamParams, CrossEntropy, LoraSpec


@asynccontextmanager
async def running(model: Path, output: Path, **settings: object) -> AsyncIterator[EngineClient]:
    client = EngineClient(config_for(model=str(model), output_dir=str(output), **settings))
    await client.start()
    try:
        async with asyncio.timeout(60):
            while client.state == "starting":
                await asyncio.sleep(0.05)
        yield client
    finally:
        await client.stop()


def batch(seed: int = 0) -> list[AnyCommand]:
    data = datums(random_sequences(np.random.default_rng(seed), (7, 3)))
    return [
        ForwardBackward(model_id="m", datums=data, loss=CrossEntropy(), token_mean=True),
        OptimStep(model_id="m", adam=AdamParams(learning_rate=1e-2)),
    ]


def test_commands_of_a_model_run_in_order_and_fail_alone(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, tmp_path) as engine:
            assert engine.info is not None
            assert engine.info.vocab_size == 128
            commands = [CreateModel(model_id="m", lora=LoraSpec(rank=2)), *batch(), *batch(), *batch()]
            stray = OptimStep(model_id="stray", adam=AdamParams())
            futures = [engine.submit(command) for command in commands]
            with pytest.raises(UnknownId, match="stray"):
                await engine.submit(stray)
            results = [await future for future in futures]
            assert [r.step for r in results[2::2]] == [1, 2, 3]
            assert results[5].metrics["loss:sum"] < results[1].metrics["loss:sum"]
            with pytest.raises(InvalidRequest):
                await engine.submit(CreateModel(model_id="m", lora=LoraSpec(rank=9)))
            assert engine.num_queued == 0

    asyncio.run(scenario())


def test_sleep_comes_after_what_was_asked_before_it(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, tmp_path) as engine:
            created = CreateModel(model_id="m", lora=LoraSpec(rank=2))
            commands = [created, *batch(), *batch(), Sleep(), WakeUp(), *batch()]
            results = await asyncio.gather(*(engine.submit(command) for command in commands))
            assert [result.step for result in (results[2], results[4], results[-1])] == [1, 2, 3]

    asyncio.run(scenario())


def test_two_servers_may_share_an_output_dir(tiny_model: Path, tmp_path: Path) -> None:
    """What each sets aside is its own, and goes with it."""

    async def scenario() -> None:
        one, two = (running(tiny_model, tmp_path, max_resident_adapters=1) for _ in range(2))
        async with one as first, two as second:
            for engine in (first, second):
                for model_id, rank in (("a", 2), ("m", 3)):
                    await engine.submit(CreateModel(model_id=model_id, lora=LoraSpec(rank=rank)))
            assert len(list(tmp_path.rglob("*.safetensors"))) == 2
        assert not list(tmp_path.iterdir())

    asyncio.run(scenario())


def test_a_full_queue_refuses(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, tmp_path, max_queued=3) as engine:
            futures = [engine.submit(CreateModel(model_id="m", lora=LoraSpec(rank=2))) for _ in range(3)]
            with pytest.raises(QueueFull):
                engine.submit(batch()[1])
            await asyncio.gather(*futures)
            await engine.submit(batch()[1])

    asyncio.run(scenario())


def test_a_killed_engine_fails_what_waits_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_model, tmp_path) as engine:
            await engine.submit(CreateModel(model_id="m", lora=LoraSpec(rank=2)))
            data = datums(random_sequences(np.random.default_rng(0), (400,) * 64))
            future = engine.submit(Forward(model_id="m", datums=data, loss=CrossEntropy()))
            engine._processes[0].kill()
            with pytest.raises(EngineLost, match="exit code -9"):
                await future
            assert engine.state == "dead"
            with pytest.raises(EngineLost):
                engine.submit(batch()[1])

    asyncio.run(scenario())


def test_a_model_that_is_not_there_ends_the_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path / "nowhere", tmp_path) as engine:
            assert engine.state == "dead"
            assert engine.failed_to_start

    asyncio.run(scenario())
