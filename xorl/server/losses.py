"""Reads a loss and its options from their wire names."""

import math
from collections.abc import Mapping

import msgspec

from xorl.errors import InvalidRequest
from xorl.types import LOSSES, AnyLoss

BY_NAME = {loss.__struct_config__.tag: loss for loss in LOSSES}

MUST_BE_POSITIVE = ("logprob_temperature", "icepop_beta", "eps_clip_c")


def parse_loss(name: str, options: Mapping[str, bool | float | str | None]) -> AnyLoss:
    """The loss that `loss_fn` and `loss_fn_params` ask for; a null option is one not given.

    Raises:
        InvalidRequest: naming the loss or the option.
    """
    kind = BY_NAME.get(name)
    if kind is None:
        raise InvalidRequest(f"loss_fn: there is no loss {name!r}; there are {', '.join(map(str, BY_NAME))}")
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    given: dict[str, bool | float | str] = {"loss_fn": name}
    for option, value in options.items():
        if option not in types:
            known = ", ".join(types) or "none"
            raise InvalidRequest(f"loss_fn_params.{option}: {name} has no such option; it has {known}")
        if value is not None:
            given[option] = _checked(option, value, is_bool=types[option] is bool)
    try:
        return msgspec.convert(given, AnyLoss)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"loss_fn_params: {error}") from None


def _checked(option: str, value: bool | float | str, *, is_bool: bool) -> bool | float | str:
    """The value, finite, and with the number that protobuf has for a bool turned back into one."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value) or (option in MUST_BE_POSITIVE and value <= 0):
        raise InvalidRequest(f"loss_fn_params.{option}: {value} is out of range")
    if is_bool and value in (0, 1):
        return bool(value)
    if isinstance(value, bool) and not is_bool:
        raise InvalidRequest(f"loss_fn_params.{option}: expected a number, got {value}")
    return value
