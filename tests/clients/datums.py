"""What xorl-client sends and gets."""

import numpy as np
from xorl_client import types

from builders import random_sequences


def data(seed: int = 0, lengths: tuple[int, ...] = (6, 11, 3), **inputs: list[np.ndarray]) -> list[types.Datum]:
    sequences = random_sequences(np.random.default_rng(seed), lengths)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(sequence[:-1]),
            loss_fn_inputs={
                "target_tokens": tensor(sequence[1:], "int64"),
                **{name: tensor(values[i], "float32") for name, values in inputs.items()},
            },
        )
        for i, sequence in enumerate(sequences)
    ]


def tensor(values: list[int] | np.ndarray, dtype: str) -> types.TensorData:
    values = np.asarray(values).tolist()
    return types.TensorData(data=values, dtype=dtype, shape=[len(values)])


def logprobs(output: types.ForwardBackwardOutput) -> list[list[float]]:
    return [entry["logprobs"].tolist() for entry in output.loss_fn_outputs]
