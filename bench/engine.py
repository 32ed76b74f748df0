"""How busy does the engine keep the device? `python -m bench.engine [--device cuda]`

Queued batches: one tenant's training loop, all of it queued. The floor is the same loop in bare torch, on the same
layers and batches, without server, queue or results.
Tenants: many of them with one small batch and a step each, coalesced and one request after the other.
Lengths: one request of mixed lengths, packed and padded to the longest.
Futures: commands that compute nothing, through the engine's own process and client.
"""

import asyncio
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import zmq
from transformers import AutoConfig, AutoModelForCausalLM

from bench.harness import Options, Result, compare, options, report
from bench.timeline import draw
from xorl.config import Config, load
from xorl.engine.adapters import TrainedModel
from xorl.engine.client import EngineClient
from xorl.engine.commands import (
    AnyCommand,
    AnyResult,
    CreateModel,
    Datums,
    Failed,
    ForwardBackward,
    OptimStep,
    UnloadModel,
)
from xorl.engine.engine import Engine
from xorl.engine.loop import EngineLoop
from xorl.engine.lora import Span
from xorl.engine.trace import STAGES, Stage, Trace
from xorl.engine.trace import Span as TraceSpan
from xorl.types import IGNORED_TARGET, AdamParams, CrossEntropy, LoraSpec
from xorl_kernels.logprobs import logprobs

XORL, ONE_BY_ONE, BARE = "xorl", "one request at a time", "bare torch loop"
ADAM = AdamParams(learning_rate=1e-4, grad_clip_norm=1.0)
SPEC = LoraSpec(rank=8, alpha=16, seed=0)


class Size(NamedTuple):
    """What is measured on one kind of machine; the model's weights are random."""

    model: dict[str, int]  # of Qwen3
    batch_tokens: int
    sequence: int  # tokens of a sequence of the queued batches
    num_batches: int
    tenants: tuple[int, ...]
    tenant_tokens: int  # of a tenant's small batch, one sequence
    lengths: tuple[int, ...]
    num_futures: int


def _network(hidden: int, layers: int, vocab: int, heads: int, head_dim: int = 64) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


TINY = Size(
    model=_network(64, 2, 128, 4, 16),
    batch_tokens=64,
    sequence=16,
    num_batches=3,
    tenants=(1, 4),
    tenant_tokens=8,
    lengths=(30, 1, 7, 3),
    num_futures=64,
)
ON_CPU = Size(
    model=_network(256, 12, 8192, 4),
    batch_tokens=512,
    sequence=64,
    num_batches=8,
    tenants=(1, 4, 16, 64),
    tenant_tokens=8,
    lengths=(256, 17, 90, 33, 200, 5, 120, 64, 12, 48),
    num_futures=4096,
)
ON_CUDA = Size(
    model=_network(1024, 28, 151_936, 16, 128),
    batch_tokens=8192,
    sequence=1024,
    num_batches=16,
    tenants=(1, 4, 16, 64),
    tenant_tokens=64,
    lengths=(8192, 128, 900, 4096, 333, 2048),
    num_futures=4096,
)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__ or "", arguments)
    torch.set_num_threads(1)  # of two cores, one prepares
    size = TINY if chosen.small else ON_CUDA if chosen.device.type == "cuda" else ON_CPU
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **size.model), dtype=torch.float32)
        network.save_pretrained(f"{folder}/model")
        config = load(
            {
                "model": f"{folder}/model",
                "device": chosen.device.type,
                "output_dir": folder,
                "max_batch_tokens": size.batch_tokens,
                "torch_threads": 1,
            },
            environ={},
        )
        engine = Engine(config, Path(folder, "evicted"))
        results = [
            *queued_batches(engine, size, chosen),
            *(result for count in size.tenants for result in tenants(engine, size, count, chosen)),
            *mixed_lengths(engine, size, chosen),
        ]
        del engine
        results += futures(config, size, chosen)
    report("engine loop", results, chosen)


class Served:
    """An engine behind its loop, with a client on the calling thread."""

    def __init__(self, commands: zmq.Socket[bytes], results: zmq.Socket[bytes]) -> None:
        self._commands, self._results = commands, results
        self._numbers = itertools.count(1)
        self._decoder = msgspec.msgpack.Decoder(AnyResult)

    def run(self, commands: Sequence[AnyCommand]) -> None:
        """Send all at once, and wait for all."""
        waiting = set()
        for command, number in zip(commands, self._numbers, strict=False):
            self._commands.send_multipart([number.to_bytes(8), msgspec.msgpack.encode(command)])
            waiting.add(number)
        while waiting:
            number, body = self._results.recv_multipart()
            if int.from_bytes(number):
                waiting.remove(int.from_bytes(number))
                _check(self._decoder.decode(body))


@contextmanager
def served(engine: Engine, trace: Trace) -> Iterator[Served]:
    context, ended = zmq.Context(), threading.Event()
    sockets = {name: (context.socket(zmq.PAIR), context.socket(zmq.PAIR)) for name in ("commands", "results")}
    for name, (ours, theirs) in sockets.items():
        for socket in (ours, theirs):
            socket.set_hwm(0)
        ours.bind(f"inproc://{name}")
        theirs.connect(f"inproc://{name}")
    loop = EngineLoop(engine, sockets["commands"][1], sockets["results"][1], trace)
    thread = threading.Thread(target=loop.run, args=[lambda: not ended.is_set()])
    thread.start()
    try:
        yield Served(sockets["commands"][0], sockets["results"][0])
    finally:
        ended.set()
        thread.join()
        context.destroy(linger=0)


def one_by_one(engine: Engine, commands: Sequence[AnyCommand], trace: Trace) -> None:
    """Each request through all stages before the next one: a loop without overlap and without company."""
    decoder = msgspec.msgpack.Decoder(AnyCommand)
    earlier = len(trace.spans()) // len(STAGES)
    for number, message in enumerate([msgspec.msgpack.encode(command) for command in commands], start=earlier):
        command: AnyCommand = decoder.decode(message)
        with _recorded(trace, "prepare", number, command):
            prepared = engine.prepare([command])
        with _recorded(trace, "compute", number, command):
            (outcome,) = engine.compute(prepared)
            _synchronise(engine)
        with _recorded(trace, "deliver", number, command):
            msgspec.msgpack.encode(outcome())


@contextmanager
def _recorded(trace: Trace, stage: Stage, number: int, command: AnyCommand) -> Iterator[None]:
    start = time.perf_counter()
    yield
    trace.add(TraceSpan(stage, number, start, time.perf_counter(), type(command).__name__, 1, 0, 0))


def _synchronise(engine: Engine) -> None:
    if engine.base.device.type == "cuda":
        torch.cuda.synchronize()


def queued_batches(engine: Engine, size: Size, chosen: Options) -> list[Result]:
    """forward_backward and optim_step, again and again, for one model."""
    engine.run(CreateModel(model_id="queued", lora=SPEC))
    rng = np.random.default_rng(0)
    batches = [
        random_datums(rng, [size.sequence] * (size.batch_tokens // size.sequence), size.model["vocab_size"])
        for _ in range(size.num_batches)
    ]
    commands = [command for data in batches for command in _training("queued", data)]
    traces = {name: Trace() for name in (XORL, ONE_BY_ONE)}
    with served(engine, traces[XORL]) as client:
        competitors = {
            BARE: bare_loop(engine, batches, size),
            XORL: lambda: client.run(commands),
            ONE_BY_ONE: lambda: one_by_one(engine, commands, traces[ONE_BY_ONE]),
        }
        results = compare(f"queued, {size.num_batches} x {size.batch_tokens} tokens", competitors, BARE, chosen)
    for name, trace in traces.items():
        idle = idle_fraction(trace, len(commands))
        print(f"queued batches, {name}: the device idles {idle:.2%} of the time between first and last")
        if chosen.json is not None:
            trace.write(chosen.json.with_suffix(f".{name.replace(' ', '-')}.trace.json"))
    if chosen.png is not None:
        draw(
            {name: last_spans(trace, len(commands)) for name, trace in traces.items()},
            chosen.png.with_suffix(".timeline.png"),
        )
    engine.run(UnloadModel(model_id="queued"))
    return results


def bare_loop(engine: Engine, batches: Sequence[Datums], size: Size) -> Callable[[], None]:
    """What somebody would write who has one model, its batches on the device, and nobody to answer to."""
    base, model = engine.base, TrainedModel.lora(SPEC, engine.base)
    gradient = model.new_gradient()
    leaves = [factor for pair in gradient.adapter.values() for factor in pair]
    optimizer = torch.optim.AdamW(leaves, lr=ADAM.learning_rate, betas=(0.9, 0.95), fused=True)
    lengths = [size.sequence] * (size.batch_tokens // size.sequence)
    places_T = torch.arange(size.sequence, device=base.device).repeat(len(lengths))
    sequences = base.sequences(lengths)
    on_device = [
        tuple(torch.tensor(np.frombuffer(x, np.int32)).long().to(base.device) for x in (data.tokens, data.targets))
        for data in batches
    ]

    def run() -> None:
        for tokens_T, targets_T in on_device:
            with base.router.routing([Span(0, len(tokens_T), gradient.adapter, SPEC.scale)]):
                hidden_TH = base.hidden_states(tokens_T, places_T, sequences)
                loss = -logprobs(hidden_TH, base.head_VH, targets_T[:, None]).mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(leaves, ADAM.grad_clip_norm)
            optimizer.step()
            gradient.tensors[0].zero_()
        _synchronise(engine)

    return run


def tenants(engine: Engine, size: Size, count: int, chosen: Options) -> list[Result]:
    """One small forward_backward and one optim_step of each."""
    ids = [f"tenant-{number}" for number in range(count)]
    rng = np.random.default_rng(count)
    forwards, steps = [], []
    for model_id in ids:
        engine.run(CreateModel(model_id=model_id, lora=SPEC))
        forward, step = _training(model_id, random_datums(rng, [size.tenant_tokens], size.model["vocab_size"]))
        forwards.append(forward)
        steps.append(step)
    with served(engine, Trace()) as client:
        competitors = {
            ONE_BY_ONE: lambda: one_by_one(engine, [*forwards, *steps], Trace()),
            XORL: lambda: client.run([*forwards, *steps]),
        }
        results = compare(f"{count} tenants x {size.tenant_tokens} tokens", competitors, ONE_BY_ONE, chosen)
    for model_id in ids:
        engine.run(UnloadModel(model_id=model_id))
    rates = [count * size.tenant_tokens / result.median_s for result in results]
    print(
        f"{count} tenants: {rates[1]:,.0f} tokens/s, one after the other {rates[0]:,.0f}: {rates[1] / rates[0]:.1f} x"
    )
    return results


def mixed_lengths(engine: Engine, size: Size, chosen: Options) -> list[Result]:
    """forward_backward of sequences as they are, and padded to the longest with targets that are ignored."""
    engine.run(CreateModel(model_id="mixed", lora=SPEC))
    rng = np.random.default_rng(0)
    useful, longest = sum(size.lengths), max(size.lengths)
    requests = {}
    for name, lengths in (("packed", size.lengths), ("padded", [longest] * len(size.lengths))):
        data = random_datums(rng, lengths, size.model["vocab_size"])
        targets = np.frombuffer(data.targets, np.int32).copy()
        starts = np.frombuffer(data.offsets, np.int32)
        for start, stop, length in zip(starts, starts[1:], size.lengths, strict=False):
            targets[start + length : stop] = IGNORED_TARGET
        requests[name] = _training("mixed", msgspec.structs.replace(data, targets=targets.tobytes()))[0]
        print(f"mixed lengths, {name}: {useful / sum(lengths):.0%} of the computed tokens are useful")
    competitors = {name: lambda command=command: engine.run(command) for name, command in requests.items()}
    results = compare(f"mixed lengths up to {longest}", competitors, "packed", chosen)
    engine.run(UnloadModel(model_id="mixed"))
    return results


def futures(config: Config, size: Size, chosen: Options) -> list[Result]:
    """optim_steps without a gradient, of 16 models, 64 in flight for each. The floor is what the codec takes."""

    async def measure() -> float:
        client = EngineClient(config)
        await client.start()
        while client.state == "starting":
            await asyncio.sleep(0.05)
        ids = [f"m{number}" for number in range(16)]
        await asyncio.gather(*(client.submit(CreateModel(model_id=model_id, lora=SPEC)) for model_id in ids))

        async def work(model_id: str) -> None:
            for _ in range(size.num_futures // (16 * 4)):
                await asyncio.gather(*(client.submit(OptimStep(model_id=model_id, adam=ADAM)) for _ in range(4)))

        await asyncio.gather(*map(work, ids))
        start = time.perf_counter()
        await asyncio.gather(*map(work, ids))
        seconds = time.perf_counter() - start
        await client.stop()
        return seconds / (16 * 4 * (size.num_futures // (16 * 4)))

    seconds = asyncio.run(measure())
    message = OptimStep(model_id="m", adam=ADAM)
    start = time.perf_counter()
    for _ in range(1000):
        msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=AnyCommand)
    codec_s = 2 * (time.perf_counter() - start) / 1000
    print(f"futures: {1 / seconds:,.0f}/s")
    return [Result("a future", "xorl's client and engine", seconds, 0.0, codec_s, None, "encode and decode, twice")]


def random_datums(rng: np.random.Generator, lengths: Sequence[int], vocab_size: int) -> Datums:
    tokens, targets = rng.integers(0, vocab_size, (2, sum(lengths)), dtype=np.int32)
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    return Datums(tokens=tokens.tobytes(), offsets=offsets.tobytes(), targets=targets.tobytes(), loss_inputs={})


def _training(model_id: str, data: Datums) -> tuple[ForwardBackward, OptimStep]:
    forward = ForwardBackward(model_id=model_id, datums=data, loss=CrossEntropy(), token_mean=True)
    return forward, OptimStep(model_id=model_id, adam=ADAM)


def _check(result: AnyResult) -> None:
    if isinstance(result, Failed):
        raise RuntimeError(result.message)


def last_spans(trace: Trace, num_steps: int) -> list[TraceSpan]:
    """Those of the last run, of that many steps."""
    spans = trace.spans()
    first = max(span.step for span in spans) - num_steps
    return [span for span in spans if span.step > first]


def idle_fraction(trace: Trace, num_steps: int) -> float:
    """Of the time from the first step's begin to the last one's end, what no step computes in."""
    computing = [span for span in last_spans(trace, num_steps) if span.stage == "compute"]
    busy = sum(span.stop - span.start for span in computing)
    return 1 - busy / (computing[-1].stop - computing[0].start)


if __name__ == "__main__":
    main()
