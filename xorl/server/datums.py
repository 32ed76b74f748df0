"""Lays datums into the columns of a command, refusing what is wrong with them by name.

N: datums; T: tokens of all of them, or of one in functions about one; K: candidate targets a position.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xorl.engine.commands import Datums, ModelInfo
from xorl.errors import InvalidRequest
from xorl.server.schema import Datum, ModelInput, Tensor, TensorLike
from xorl.types import IGNORED_TARGET, AnyLoss, CausalLmLoss, CrossEntropy, DrGrpo

MAX_LOGPROB = 1e-3
"""A log-probability may exceed 0 by this much, as rounding does."""

MAX_TARGET_CELLS = 2**27
"""Bound on T * K, since a sparse tensor can ask for far more memory than it takes on the wire."""

LOGPROBS = ("logprobs", "rollout_logprobs", "ref_logprobs")

FILL = {"weights": 1.0, "sequence_ratio_mask": 1.0}
"""What stands for an optional input of a datum without it, where another datum has it."""


class Example(NamedTuple):
    """One datum as arrays of any number type, not yet checked against each other."""

    tokens: np.ndarray
    inputs: Mapping[str, np.ndarray]


class Columns(NamedTuple):
    datums: Datums
    widths: tuple[int, ...]  # each datum's own K; 0 where its targets had one dimension


class _Row(NamedTuple):
    tokens_T: np.ndarray
    targets_TK: np.ndarray
    inputs: Mapping[str, np.ndarray]
    width: int


def wanted(loss: AnyLoss) -> frozenset[str]:
    """Names of the loss_fn_inputs that are read at all; others are nobody's business."""
    return frozenset(("target_tokens", "labels", "old_logprobs", *loss.required, *loss.optional))


def from_json(data: Sequence[Datum], loss: AnyLoss) -> list[Example]:
    names = wanted(loss)
    examples: list[Example] = []
    for i, datum in enumerate(data):
        inputs = {
            name: array(value, f"data[{i}].loss_fn_inputs.{name}")
            for name, value in datum.loss_fn_inputs.items()
            if value is not None and name in names
        }
        examples.append(Example(prompt_tokens(datum.model_input, f"data[{i}].model_input"), inputs))
    return examples


def prompt_tokens(model_input: ModelInput, where: str) -> np.ndarray:
    """The tokens of a model_input: its input_ids, or its text chunks end to end."""
    if model_input.input_ids is not None:
        return array(model_input.input_ids, f"{where}.input_ids")
    pieces: list[np.ndarray] = []
    for i, chunk in enumerate(model_input.chunks or ()):
        if chunk.type != "encoded_text" or chunk.tokens is None:
            raise InvalidRequest(f"{where}.chunks[{i}]: only encoded_text chunks are supported")
        pieces.append(array(chunk.tokens, f"{where}.chunks[{i}].tokens"))
    if not pieces:
        raise InvalidRequest(f"{where}: needs input_ids or chunks")
    return np.concatenate(pieces)


def array(value: TensorLike, where: str) -> np.ndarray:
    """A wire tensor as float64, which holds every token id exactly."""
    data, shape = (value.data, value.shape) if isinstance(value, Tensor) else (value, None)
    if len(data) and isinstance(data[0], list | np.ndarray):
        if any(not isinstance(row, list | np.ndarray) or len(row) != len(data[0]) for row in data):
            raise InvalidRequest(f"{where}: the rows of a nested list must be lists of one length")
        flat = np.concatenate([_numbers(row, where) for row in data])
        return shaped(flat, shape or [len(data), len(data[0])], where)
    return shaped(_numbers(data, where), shape, where)


def _numbers(data: list[Any] | np.ndarray, where: str) -> np.ndarray:
    if isinstance(data, np.ndarray):
        return data
    kinds = set(map(type, data)) - {int, float}
    if kinds:
        names = sorted("list" if kind is np.ndarray else kind.__name__ for kind in kinds)
        raise InvalidRequest(f"{where}: expected numbers, found {', '.join(names)}")
    return np.asarray(data, dtype=np.float64)


def shaped(flat: np.ndarray, shape: Sequence[int] | None, where: str) -> np.ndarray:
    if not shape:
        return flat
    if min(shape) < 0 or math.prod(shape) != flat.size:
        raise InvalidRequest(f"{where}: shape {list(shape)} does not fit {flat.size} values")
    return flat.reshape(shape)


def columns(examples: Sequence[Example], loss: AnyLoss, info: ModelInfo) -> Columns:
    """Check everything that can be known without the model, then lay the datums end to end.

    Raises:
        InvalidRequest: naming `data[i].loss_fn_inputs.<name>` or the part of model_input.
    """
    if not examples:
        raise InvalidRequest("data: empty")
    rows = [_row(i, example, loss, info) for i, example in enumerate(examples)]
    lengths = [len(row.tokens_T) for row in rows]
    num_targets = max(row.targets_TK.shape[1] for row in rows)
    if sum(lengths) * num_targets > MAX_TARGET_CELLS:
        raise InvalidRequest(f"data: {sum(lengths)} tokens x {num_targets} targets are too many for one request")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens_T = np.concatenate([row.tokens_T for row in rows])
    targets_TK = np.concatenate([_widen(row.targets_TK, num_targets, IGNORED_TARGET) for row in rows])
    _check_ids(tokens_T, offsets, info.vocab_size, "model_input")
    _check_ids(targets_TK, offsets, info.vocab_size, "loss_fn_inputs.target_tokens", ignored=IGNORED_TARGET)
    names = [name for name in (*loss.required, *loss.optional) if any(name in row.inputs for row in rows)]
    return Columns(
        Datums(
            tokens=tokens_T.astype(np.int32).tobytes(),
            offsets=offsets.tobytes(),
            targets=targets_TK.astype(np.int32).tobytes(),
            loss_inputs={name: _column(name, rows, offsets, num_targets) for name in names},
            num_targets=num_targets,
        ),
        tuple(row.width for row in rows),
    )


def _row(i: int, example: Example, loss: AnyLoss, info: ModelInfo) -> _Row:
    """One datum: labels shifted, inputs present and of the right length."""
    where = f"data[{i}].loss_fn_inputs"
    inputs = dict(example.inputs)
    tokens_T = _flat(example.tokens, f"data[{i}].model_input")
    labels = inputs.pop("labels", None)
    if "target_tokens" not in inputs:
        if labels is None:
            raise InvalidRequest(f"{where}.target_tokens: missing")
        tokens_T, inputs = _shift(i, tokens_T, _flat(labels, f"{where}.labels"), inputs)
    if not 0 < len(tokens_T) <= info.max_context_length:
        raise InvalidRequest(
            f"data[{i}].model_input: {len(tokens_T)} tokens; 1 to {info.max_context_length} are possible"
        )
    targets = inputs.pop("target_tokens")
    _check_length(targets, tokens_T, f"{where}.target_tokens")
    if targets.ndim == 2 and not isinstance(loss, CrossEntropy | CausalLmLoss):
        raise InvalidRequest(f"{where}.target_tokens: two dimensions are for cross_entropy and causallm_loss")
    old_logprobs = inputs.pop("old_logprobs", None)
    if old_logprobs is not None and isinstance(loss, DrGrpo):
        inputs.setdefault("logprobs", old_logprobs)
    needs = (*loss.required, "ref_logprobs") if isinstance(loss, DrGrpo) and loss.beta > 0 else loss.required
    for name in needs:
        if name not in inputs:
            raise InvalidRequest(f"{where}.{name}: missing; {loss.__struct_config__.tag} needs it")
    targets_TK = targets.reshape(len(tokens_T), -1)
    if targets_TK.shape[1] == 0:
        raise InvalidRequest(f"{where}.target_tokens: no target at any position")
    for name, values in inputs.items():
        same = values.shape == targets.shape or values.size == targets.size == len(tokens_T)
        if name == "weights" and not same:
            raise InvalidRequest(f"{where}.weights: shape {values.shape} is not target_tokens' {targets.shape}")
        _check_length(values if name == "weights" else _flat(values, f"{where}.{name}"), tokens_T, f"{where}.{name}")
    return _Row(tokens_T, targets_TK, inputs, targets.shape[1] if targets.ndim == 2 else 0)


def _shift(
    i: int, tokens_T: np.ndarray, labels_T: np.ndarray, inputs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Turn Hugging Face's labels, which name each token itself, into targets, which name the next one."""
    _check_length(labels_T, tokens_T, f"data[{i}].loss_fn_inputs.labels")
    if len(tokens_T) < 2:
        raise InvalidRequest(f"data[{i}].loss_fn_inputs.labels: one token leaves nothing to predict")
    shifted = {name: values[1:] if len(values) == len(tokens_T) else values for name, values in inputs.items()}
    return tokens_T[:-1], shifted | {"target_tokens": labels_T[1:]}


def _flat(values: np.ndarray, where: str) -> np.ndarray:
    if values.ndim == 2 and 1 in values.shape:
        return values.reshape(-1)
    if values.ndim != 1:
        raise InvalidRequest(f"{where}: expected one dimension, got shape {values.shape}")
    return values


def _check_length(values: np.ndarray, tokens_T: np.ndarray, where: str) -> None:
    if values.ndim not in (1, 2) or len(values) != len(tokens_T):
        raise InvalidRequest(f"{where}: length {len(values)} does not match model_input length {len(tokens_T)}")


def _widen(values_TK: np.ndarray, num_targets: int, fill: float) -> np.ndarray:
    missing = num_targets - values_TK.shape[1]
    return np.pad(values_TK, ((0, 0), (0, missing)), constant_values=fill) if missing else values_TK


def _column(name: str, rows: Iterable[_Row], offsets: np.ndarray, num_targets: int) -> bytes:
    """One loss input of all datums, float32."""
    pieces: list[np.ndarray] = []
    for i, row in enumerate(rows):
        values = row.inputs.get(name)
        if values is None:
            if name not in FILL:
                raise InvalidRequest(f"data[{i}].loss_fn_inputs.{name}: missing, although other datums have it")
            values = np.full(row.targets_TK.shape if name == "weights" else len(row.tokens_T), FILL[name])
        if name == "weights":
            values = _widen(values.reshape(row.targets_TK.shape), num_targets, 0.0)
        pieces.append(values if name == "weights" else values.reshape(-1))
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        column = np.concatenate(pieces).astype(np.float32)
    _refuse(~np.isfinite(column), column, offsets, f"loss_fn_inputs.{name}", "is not finite")
    if name in LOGPROBS:
        _refuse(column > MAX_LOGPROB, column, offsets, f"loss_fn_inputs.{name}", "is above 0, which no logarithm is")
    return column.tobytes()


def _check_ids(ids: np.ndarray, offsets: np.ndarray, vocab_size: int, field: str, ignored: int | None = None) -> None:
    with np.errstate(invalid="ignore"):
        bad = (ids != np.trunc(ids)) | ~((ids >= 0) & (ids < vocab_size))
    if ignored is not None:
        bad &= ids != ignored
    _refuse(bad, ids, offsets, field, f"is not a token id in [0, {vocab_size})")


def _refuse(bad: np.ndarray, values: np.ndarray, offsets: np.ndarray, field: str, problem: str) -> None:
    if not bad.any():
        return
    cell = np.argwhere(bad)[0]
    datum = int(np.searchsorted(offsets, cell[0], side="right")) - 1
    value = float(values[tuple(cell)])
    raise InvalidRequest(f"data[{datum}].{field}: {value:g} at position {cell[0] - offsets[datum]} {problem}")
