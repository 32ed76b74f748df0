"""Builds configurations and requests for tests."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from xorl.config import Config, load
from xorl.engine.commands import Datums, Endpoint, Forward, ForwardBackward, SyncWeights
from xorl.types import (
    AnyLoss,
    CausalLmLoss,
    Cispo,
    CrossEntropy,
    DrGrpo,
    Dro,
    Gspo,
    ImportanceSampling,
    PolicyLoss,
    Ppo,
)

IGNORED = -100

LOSSES: tuple[AnyLoss, ...] = (
    CrossEntropy(),
    CausalLmLoss(return_per_token=False),
    ImportanceSampling(),
    Ppo(clip_low_threshold=0.5),
    Cispo(),
    Dro(),
    Gspo(),
    PolicyLoss(use_tis=True, logprob_temperature=0.7),
    DrGrpo(beta=0.1, ratio_type="sequence"),
)


def config_for(**settings: object) -> Config:
    return load({"device": "cpu", "torch_threads": 1, **settings}, environ={})


def datums(sequences: Sequence[Sequence[int]], **inputs: Sequence[Sequence[float]]) -> Datums:
    """Next-token prediction over `sequences` (each one token longer than its datum), with per-token inputs."""
    lengths = [len(sequence) - 1 for sequence in sequences]
    return Datums(
        tokens=_int32([token for sequence in sequences for token in sequence[:-1]]),
        offsets=_int32(np.concatenate([[0], np.cumsum(lengths)])),
        targets=_int32([token for sequence in sequences for token in sequence[1:]]),
        loss_inputs={name: np.concatenate(values).astype(np.float32).tobytes() for name, values in inputs.items()},
    )


def random_sequences(rng: np.random.Generator, lengths: Sequence[int], vocab_size: int = 128) -> list[list[int]]:
    return [rng.integers(3, vocab_size, length + 1).tolist() for length in lengths]


def request(model_id: str, loss: AnyLoss, seed: int, *, backward: bool = True) -> Any:
    """One to four datums of up to 19 tokens, with what the loss needs."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, size=1 + seed % 4).tolist()
    arrays = {name: [rng.normal(size=length) for length in lengths] for name in ("weights", "advantages")}
    for name in ("logprobs", "rollout_logprobs", "ref_logprobs"):
        arrays[name] = [-5 + rng.normal(size=length) for length in lengths]
    wanted = {name: arrays[name] for name in (*loss.required, *loss.optional) if name in arrays}
    data = datums(random_sequences(rng, lengths), **wanted)
    if backward:
        return ForwardBackward(model_id=model_id, datums=data, loss=loss, token_mean=bool(seed % 2))
    return Forward(model_id=model_id, datums=data, loss=loss)


def sync_into(*ports: int, **changes: Any) -> SyncWeights:
    """A push of the model `default` into servers on this machine."""
    command = SyncWeights(
        model_id="default",
        endpoints=[Endpoint("127.0.0.1", port) for port in ports],
        master_address="",
        master_port=0,
        group_name="weight_sync_group",
        bucket_bytes=10_000,
        flush_cache=False,
        cache_mode="auto",
        pause_mode="retract",
        weight_version="v1",
        quantization=None,
    )
    return msgspec.structs.replace(command, **changes)


def poisoned(model_id: str) -> ForwardBackward:
    """The loss of its second datum is not finite."""
    rng = np.random.default_rng(0)
    arrays = {"logprobs": [np.zeros(4), np.full(6, -300.0)], "advantages": [np.ones(4), -np.ones(6)]}
    data = datums(random_sequences(rng, (4, 6)), **arrays)
    return ForwardBackward(model_id=model_id, datums=data, loss=Ppo(), token_mean=True)


def floats(buffer: bytes | None) -> np.ndarray:
    assert buffer is not None
    return np.frombuffer(buffer, np.float32)


def _int32(values: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(values, np.int32).tobytes()
