"""Builds configurations and requests for tests."""

from collections.abc import Sequence

import numpy as np

from xorl.config import Config, load
from xorl.engine.commands import Datums

IGNORED = -100


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


def floats(buffer: bytes | None) -> np.ndarray:
    assert buffer is not None
    return np.frombuffer(buffer, np.float32)


def _int32(values: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(values, np.int32).tobytes()
