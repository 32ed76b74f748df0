"""Codes the protobuf messages of the tinker SDK.

The wire depends on field numbers and types alone, so the descriptor is built from the table below.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import zstandard
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from xorl.errors import BodyTooLarge, InvalidRequest
from xorl.server.datums import Example, shaped

# name: its fields, "number name type"; `*` repeats, `?` marks presence, `map` has string keys, `|` stands in a oneof.
MESSAGES = {
    "EncodedText": ["1 tokens bytes"],
    "Chunk": ["1 encoded_text |EncodedText", "2 image |bytes", "3 dmel |bytes"],
    "SparseCsr": ["1 values bytes", "2 crow_indices bytes", "3 col_indices bytes"],
    "Tensor": ["1 dense |bytes", "2 sparse_csr |SparseCsr", "3 dtype int32", "4 shape *int64"],
    "Datum": ["1 model_input *Chunk", "2 loss_fn_inputs map:Tensor"],
    "LossConfigValue": ["1 number |double", "2 text |string"],
    "ForwardBackwardRequest": [
        "1 model_id string",
        "2 seq_id int32",
        "3 data *Datum",
        "4 loss_fn string",
        "5 loss_fn_config map:double",
        "6 forward_only bool",
        "7 loss_fn_config_v2 map:LossConfigValue",
    ],
    "BatchedTensor": ["1 data bytes", "2 offsets bytes", "3 dtype int32", "4 trailing_shape *int64"],
    "ArrayRecord": ["1 type_tag string", "2 fields map:BatchedTensor", "3 num_datums int64"],
    "ForwardBackwardOutput": [
        "1 loss_fn_output_type string",
        "2 loss_fn_outputs *ArrayRecord",
        "3 metrics map:double",
    ],
    "SampledSequence": ["1 stop_reason int32", "2 tokens bytes", "3 logprobs ?bytes"],
    "SampleResponse": ["1 sequences *SampledSequence", "2 prompt_logprobs ?bytes"],
}
PACKAGE = "tinker_public"

FLOAT32 = 1
DTYPES = {FLOAT32: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4")}
STOP_REASONS = {"stop": 0, "length": 1}

Field = descriptor_pb2.FieldDescriptorProto


class SampledSequence(NamedTuple):
    stop_reason: Literal["stop", "length"]
    tokens: np.ndarray  # int32
    logprobs: np.ndarray | None  # float32


class ForwardBackwardMessage(NamedTuple):
    """A decoded request, its datums still as protobuf messages."""

    model_id: str
    seq_id: int
    loss_fn: str
    options: dict[str, float | str]
    forward_only: bool
    data: Sequence[Any]  # Datum messages, a type that exists only at run time


def _build() -> dict[str, type]:
    """Message classes by name, in a descriptor pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(name="xorl_tinker.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        optional: list[Field] = []
        for spec in fields:
            number, field_name, kind = spec.split()
            if kind.startswith("map:"):
                entry_name = field_name.title().replace("_", "") + "Entry"
                entry = message.nested_type.add(name=entry_name)
                entry.options.map_entry = True
                _add_field(entry, 1, "key", "string")
                _add_field(entry, 2, "value", kind[4:])
                field = _add_field(message, int(number), field_name, f"{name}.{entry_name}")
                field.label = Field.LABEL_REPEATED
                continue
            field = _add_field(message, int(number), field_name, kind.lstrip("*?|"))
            if kind[0] == "*":
                field.label = Field.LABEL_REPEATED
            elif kind[0] == "|":
                if not message.oneof_decl:
                    message.oneof_decl.add(name="value")
                field.oneof_index = 0
            elif kind[0] == "?":
                optional.append(field)
        for field in optional:  # presence in proto3 is a oneof of its own, which must come after the real ones
            field.proto3_optional = True
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


def _add_field(message: descriptor_pb2.DescriptorProto, number: int, name: str, kind: str) -> Field:
    field = message.field.add(name=name, number=number, label=Field.LABEL_OPTIONAL)
    if kind.islower():
        field.type = Field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type = Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    return field


_CLASSES: dict[str, Any] = _build()


def decompress(body: bytearray, max_bytes: int) -> bytes:
    """Undo `Content-Encoding: zstd`, never producing more than `max_bytes`."""
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(body) as reader:
            plain = reader.read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"body: not zstd: {error}") from None
    if len(plain) > max_bytes:
        raise BodyTooLarge(f"body: larger than {max_bytes} bytes when decompressed")
    return plain


def decode_forward_backward(body: bytes | bytearray) -> ForwardBackwardMessage:
    message = _CLASSES["ForwardBackwardRequest"]()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InvalidRequest(f"body: not a ForwardBackwardRequest: {error}") from None
    options: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        options[name] = value.text if value.WhichOneof("value") == "text" else value.number
    return ForwardBackwardMessage(
        message.model_id, message.seq_id, message.loss_fn, options, message.forward_only, message.data
    )


def examples(data: Sequence[Any], names: frozenset[str]) -> list[Example]:
    """The Datum messages as arrays; of the loss inputs only those in `names`."""
    found: list[Example] = []
    for i, datum in enumerate(data):
        inputs = {
            name: _array(tensor, f"data[{i}].loss_fn_inputs.{name}")
            for name, tensor in datum.loss_fn_inputs.items()
            if name in names
        }
        pieces = [np.zeros(0, np.int32)]
        for j, chunk in enumerate(datum.model_input):
            where = f"data[{i}].model_input[{j}]"
            if chunk.WhichOneof("value") != "encoded_text":
                raise InvalidRequest(f"{where}: only encoded_text chunks are supported")
            pieces.append(_numbers(chunk.encoded_text.tokens, DTYPES[3], where))
        targets = inputs.get("target_tokens")
        if targets is not None and _is_sparse(datum.loss_fn_inputs["target_tokens"]) and "weights" not in inputs:
            raise InvalidRequest(f"data[{i}].loss_fn_inputs.weights: sparse target_tokens need them")
        found.append(Example(np.concatenate(pieces), inputs))
    return found


def _is_sparse(tensor: Any) -> bool:
    return tensor.WhichOneof("value") == "sparse_csr"


def _array(tensor: Any, where: str) -> np.ndarray:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidRequest(f"{where}: unsupported dtype {tensor.dtype}")
    if _is_sparse(tensor):
        return _dense(tensor.sparse_csr, dtype, list(tensor.shape), where)
    return shaped(_numbers(tensor.dense, dtype, where), list(tensor.shape), where)


def _numbers(data: bytes, dtype: np.dtype, where: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise InvalidRequest(f"{where}: {len(data)} bytes are not a whole number of {dtype.name}")
    return np.frombuffer(data, dtype)


MAX_CELLS = 2**27


def _dense(csr: Any, dtype: np.dtype, shape: list[int], where: str) -> np.ndarray:
    """A CSR matrix with its zeros; what it leaves out is zero, for token ids as for weights."""
    values = _numbers(csr.values, dtype, where)
    crow, columns = (_numbers(part, np.dtype("<i8"), where) for part in (csr.crow_indices, csr.col_indices))
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > MAX_CELLS:
        raise InvalidRequest(f"{where}: a sparse tensor of shape {shape} is not possible here")
    counts = np.diff(crow)
    if len(crow) != shape[0] + 1 or crow[0] != 0 or crow[-1] != len(values) or (counts < 0).any():
        raise InvalidRequest(f"{where}: crow_indices do not fit {shape[0]} rows of {len(values)} values")
    if len(columns) != len(values) or ((columns < 0) | (columns >= shape[1])).any():
        raise InvalidRequest(f"{where}: col_indices do not fit {len(values)} values in {shape[1]} columns")
    dense = np.zeros(shape, dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


def encode_forward_backward(
    output_type: str, records: Sequence[tuple[tuple[int, ...], list[np.ndarray]]], metrics: Mapping[str, float]
) -> bytes:
    """`records`: the trailing shape and the per-datum logprobs of each run of datums."""
    message = _CLASSES["ForwardBackwardOutput"](loss_fn_output_type=output_type)
    for trailing_shape, arrays in records:
        record = message.loss_fn_outputs.add(type_tag=output_type, num_datums=len(arrays))
        offsets = np.concatenate([[0], np.cumsum([array.nbytes for array in arrays])])
        field = record.fields["logprobs"]
        field.data = b"".join(array.tobytes() for array in arrays)
        field.offsets = offsets.astype("<i8").tobytes()
        field.dtype = FLOAT32
        field.trailing_shape.extend(trailing_shape)
    message.metrics.update(metrics)
    return message.SerializeToString()


def encode_sample(sequences: Sequence[SampledSequence], prompt_logprobs: np.ndarray | None) -> bytes:
    message = _CLASSES["SampleResponse"]()
    for sequence in sequences:
        part = message.sequences.add(stop_reason=STOP_REASONS[sequence.stop_reason], tokens=sequence.tokens.tobytes())
        if sequence.logprobs is not None:
            part.logprobs = sequence.logprobs.tobytes()
    if prompt_logprobs is not None:
        message.prompt_logprobs = prompt_logprobs.tobytes()
    return message.SerializeToString()
