"""Reads JSON whose long lists of numbers come out as arrays.

What makes JSON slow is a Python object for each number. simdjson's document has none: its lists are copied into arrays
of float64, which hold every token id exactly.
"""

from typing import Any

import numpy as np
import orjson
import simdjson

LONG = 16
"""Shorter lists stay lists: shapes and options are such."""

SMALL_BYTES, BYTES_PER_LIST = 1024, 100
"""A document with less, or with less for each of its lists, is read no faster into arrays."""

MAX_KEYS = 64
"""simdjson finds a key by asking each: an object of a million would take minutes."""

KEPT_BYTES = 32 * 2**20
"""A parser keeps the memory of its largest document, many times as much: larger ones get a parser of their own."""

_parser = simdjson.Parser()


def loads(body: bytes | bytearray) -> Any:
    """The value of a JSON document, in which a list of LONG numbers or more may be a float64 array.

    Raises:
        orjson.JSONDecodeError: it is not JSON.
    """
    if len(body) < SMALL_BYTES:
        return orjson.loads(body)
    num_brackets = np.count_nonzero(np.frombuffer(body, np.uint8) == ord("["))
    if len(body) < BYTES_PER_LIST * num_brackets:
        return orjson.loads(body)
    parser = _parser if len(body) <= KEPT_BYTES else simdjson.Parser()
    document = _Document()
    try:
        value = document.value(parser.parse(body))
    except (ValueError, LookupError, RuntimeError):  # not JSON, or with numbers or a depth beyond simdjson
        return orjson.loads(body)
    # simdjson reads [1, [2]] as [1, 2]: then the document has more lists than were seen (or a string has brackets)
    return value if document.num_lists == num_brackets else orjson.loads(body)


class _Document:
    """One reading of a document. `num_lists`: the lists seen so far."""

    def __init__(self) -> None:
        self.num_lists = 0

    def value(self, element: Any) -> Any:
        if isinstance(element, simdjson.Array):
            self.num_lists += 1
            return self._list(element)
        if isinstance(element, simdjson.Object):
            return self._object(element)
        return element

    def _list(self, element: simdjson.Array) -> list[Any] | np.ndarray:
        if len(element) >= LONG and isinstance(element[0], int | float):
            try:
                return np.frombuffer(element.as_buffer(of_type="d"))
            except TypeError:  # it does not go on as it begins
                pass
        return [self.value(item) for item in element]

    def _object(self, element: simdjson.Object) -> dict[str, Any]:
        if len(element) > MAX_KEYS:
            raise LookupError("too many keys")
        value = {key: self.value(element[key]) for key in element}
        if len(value) < len(element):
            raise LookupError("a key that came twice, of which the last counts, and simdjson finds the first")
        return value
