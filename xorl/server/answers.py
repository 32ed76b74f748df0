"""Forms results for the wire: JSON once, however often it is asked for, protobuf where a client wants it.

N: datums; T: tokens of all of them; K: candidate targets a position.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby

import numpy as np
import orjson

from xorl.engine.commands import Datums, ForwardResult
from xorl.server import tinker_proto
from xorl.server.tinker_proto import SampledSequence
from xorl.types import AnyLoss, CausalLmLoss, CrossEntropy

JsonValue = str | int | float | bool | None | Mapping[str, "JsonValue"] | list["JsonValue"]


class JsonAnswer:
    """A result that has no protobuf form."""

    protobuf = None

    def __init__(self, value: Mapping[str, JsonValue]) -> None:
        self.json = orjson.dumps(value)


class ForwardAnswer:
    """The outputs of forward or forward_backward, cut per datum."""

    def __init__(self, result: ForwardResult, loss: AnyLoss, datums: Datums, widths: tuple[int, ...]) -> None:
        self._result = result
        self._output_type = (
            "CrossEntropyLossReturn" if isinstance(loss, CrossEntropy | CausalLmLoss) else "TorchLossReturn"
        )
        self._offsets = np.frombuffer(datums.offsets, np.int32).tolist()
        self._num_targets = datums.num_targets
        self._widths = widths

    @cached_property
    def json(self) -> bytes:
        outputs = [{"logprobs": _tensor(logprobs)} for logprobs in self._logprobs()]
        if self._result.elementwise_loss is not None:
            elementwise_T = np.frombuffer(self._result.elementwise_loss, np.float32)
            for output, (start, end) in zip(outputs, self._spans(), strict=True):
                output["elementwise_loss"] = _tensor(elementwise_T[start:end])
        answer = {
            "loss_fn_output_type": self._output_type,
            "loss_fn_outputs": outputs,
            "metrics": self._result.metrics,
            "info": {},
        }
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    @cached_property
    def protobuf(self) -> bytes:
        """One record for each run of datums of one width, since a record's tensors share their trailing shape."""
        groups = groupby(zip(self._widths, self._logprobs(), strict=True), key=lambda pair: pair[0])
        records = [(() if width == 0 else (width,), [logprobs for _, logprobs in members]) for width, members in groups]
        return tinker_proto.encode_forward_backward(self._output_type, records, self._result.metrics)

    def _spans(self) -> Iterator[tuple[int, int]]:
        return zip(self._offsets, self._offsets[1:], strict=False)

    def _logprobs(self) -> Iterator[np.ndarray]:
        """Each datum's log-probabilities, [T] or [T, K] as its targets were."""
        logprobs_TK = np.frombuffer(self._result.logprobs, np.float32).reshape(-1, self._num_targets)
        for (start, end), width in zip(self._spans(), self._widths, strict=True):
            yield np.ascontiguousarray(logprobs_TK[start:end, :width] if width else logprobs_TK[start:end, 0])


class SampleAnswer:
    """Sampled sequences; the first prompt position has no log-probability, which is NaN in protobuf, null in JSON."""

    def __init__(self, sequences: list[SampledSequence], prompt_logprobs: np.ndarray | None) -> None:
        self._sequences = sequences
        self._prompt_logprobs = prompt_logprobs

    @cached_property
    def json(self) -> bytes:
        sequences = [
            {"stop_reason": s.stop_reason, "tokens": s.tokens, "logprobs": s.logprobs} for s in self._sequences
        ]
        answer = {"type": "sample", "sequences": sequences, "prompt_logprobs": self._prompt_logprobs}
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    @cached_property
    def protobuf(self) -> bytes:
        return tinker_proto.encode_sample(self._sequences, self._prompt_logprobs)


Answer = JsonAnswer | ForwardAnswer | SampleAnswer
"""The result of a future."""


def _tensor(values: np.ndarray) -> dict[str, object]:
    return {"data": values.reshape(-1), "dtype": "float32", "shape": list(values.shape)}
