"""The reader that makes arrays of numbers means what a plain JSON reader means, of every body, whole or broken."""

from collections.abc import Callable, Iterator

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from fakes import INFO
from xorl.errors import InvalidRequest
from xorl.server import arrays, datums
from xorl.server.schema import ForwardBackwardRequest
from xorl.types import Ppo


@pytest.fixture(autouse=True, scope="module")
def everything_is_long() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SMALL_BYTES", 0), ("BYTES_PER_LIST", 0), ("LONG", 2), ("MAX_KEYS", 6)):
            patch.setattr(arrays, name, value)
        yield


def plain(value: object) -> object:
    """With lists in place of arrays, and numbers marked, since True is not one."""
    match value:
        case np.ndarray():
            return [("number", number) for number in value.tolist()]
        case list():
            return [plain(item) for item in value]
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case bool() | str() | None:
            return value
        case _:
            return "number", float(value)


def outcome(load: Callable[[bytes], object], body: bytes) -> object:
    try:
        return plain(load(body))
    except orjson.JSONDecodeError as error:
        return str(error)


numbers = st.integers(-(2**70), 2**70) | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.lists(numbers, max_size=6)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from("ab["), inner, max_size=8)
    ),
    max_leaves=30,
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """JSON, often with keys that come twice, and often broken."""
    text = orjson.dumps(draw(values.map(lambda value: value if fits(value) else [1, 2]))).decode()
    text = text.replace('"b":', draw(st.sampled_from(['"b":', '"a":'])))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", *'[]{},:"1-.e0 ', "NaN", "\x00", "1e400", "\\ud800"])) + text[at:]
    return text.encode()


def fits(value: object) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:  # orjson reads integers of any length, and writes those of 64 bits
        return False
    return True


@given(texts())
@example(b"[1,[2]]")
@example(b'{"a":[1,2],"a":[3,4]}')
@example(b'{"a\\u0000":[1,2]}')
@example(b"[1,2,123456789012345678901234567890]")
@example(b"[18446744073709551616,-9223372036854775809]")
@example(b"[-0,-0.0,1e-400,9007199254740993]")
@example(b"[1,1e400]")
@example(b"[1,NaN]")
@example(b"[1,true]")
@example(b'"\xff"')
@example(b'["[","["]')
@example(b"")
@example(b"[" * 300 + b"]" * 300)
@example(b"[" * 5000)
def test_a_body_means_what_it_means_to_a_plain_reader(body: bytes):
    assert outcome(arrays.loads, body) == outcome(orjson.loads, body)


def test_long_lists_of_numbers_and_they_alone_are_arrays():
    value = arrays.loads(b'{"a": [1, 2.5], "b": [[1, 2], [3, 4]], "c": [1, "2"], "d": [1], "e": [true, false]}')
    assert {key: type(item) for key, item in value.items()} == {"a": np.ndarray, **dict.fromkeys("bcde", list)}
    assert [type(row) for row in value["b"]] == [np.ndarray] * 2
    assert value["a"].dtype == np.float64


def test_a_document_is_read_whatever_came_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrays, "KEPT_BYTES", 16)
    bodies = [b"[1, 2, 3]", b"[1, 2, 3, 4, 5, 6, 7, 8]", b"[1, 2", b"[4, 5]"]
    kept = [outcome(arrays.loads, body) for body in bodies]
    assert kept == [outcome(orjson.loads, body) for body in bodies]


token_lists = st.lists(st.integers(0, 99), min_size=3, max_size=3)
float_lists = st.lists(st.floats(-9, 0, width=32) | st.integers(-3, 0), min_size=3, max_size=3)


def tensors(lists: st.SearchStrategy[list]) -> st.SearchStrategy[object]:
    wrapped = lists.map(lambda data: {"data": data, "dtype": "float32", "shape": [len(data)]})
    return lists | wrapped | lists.map(lambda data: [[number] for number in data])


wrong = st.sampled_from(
    [None, True, "1", 7.5, -1, 100, [], [1], {}, 2**70, [[1], [2, 3]], [1, [2], 3], {"data": [1, 2], "shape": [3]}]
)
datum = st.fixed_dictionaries(
    {
        "model_input": st.fixed_dictionaries({"input_ids": tensors(token_lists)})
        | st.fixed_dictionaries({"chunks": token_lists.map(lambda ids: [{"tokens": ids[:1]}, {"tokens": ids[1:]}])}),
        "loss_fn_inputs": st.fixed_dictionaries(
            {"target_tokens": tensors(token_lists), "logprobs": tensors(float_lists), "advantages": float_lists},
            optional={"weights": tensors(float_lists), "unknown": values},
        ),
    }
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    data = draw(st.lists(datum, min_size=1, max_size=3))
    for _ in range(draw(st.integers(0, 2))):  # put something wrong somewhere
        place: object = data
        while isinstance(place, list | dict) and place:
            at = draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
            if draw(st.integers(0, 3)) == 0 or not (isinstance(place[at], list | dict) and place[at]):
                place[at] = draw(wrong)
                break
            place = place[at]
    body = {"model_id": "m", "seq_id": 1, "forward_backward_input": {"loss_fn": "ppo", "data": data}}
    return orjson.dumps(body | draw(st.sampled_from([{}, {"model": "x[1]"}]))) if fits(body) else b"{}"


def columns(load: Callable[[bytes], object], body: bytes) -> object:
    """What the engine would be sent, or what would be said to be wrong, and where."""
    try:
        given = ForwardBackwardRequest.model_validate(load(body)).forward_backward_input
        return datums.columns(datums.from_json(given.data, Ppo()), Ppo(), INFO)
    except ValidationError as error:
        return [(problem["loc"], problem["msg"]) for problem in error.errors()]
    except InvalidRequest as error:
        return str(error)


@given(requests())
def test_a_request_becomes_the_columns_or_the_refusal_that_plain_lists_make_of_it(body: bytes):
    assert columns(arrays.loads, body) == columns(orjson.loads, body)
