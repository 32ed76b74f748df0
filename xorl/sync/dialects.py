"""Spells weight updates as the different releases of SGLang want them."""

import contextlib
import re
from collections.abc import Sequence
from typing import Protocol

import msgspec

from xorl.sync.receiver import Receiver, ReceiverError, ServerInfo

WITH_BUCKETS = (0, 5, 10)
"""Releases from this one on take a broadcast of many tensors in one piece; some before it do too."""

FORMATS = {True: "flattened_bucket", False: None}
"""load_format, by whether tensors come in one piece."""


class Announcement(msgspec.Struct, frozen=True):
    """The tensors of one bucket, in the order in which their bytes come."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Sequence[int]]
    in_one_piece: bool
    last: bool


class Dialect(Protocol):
    """How one server takes an update. Its methods block.

    Raises:
        ReceiverError: the server refused or did not answer.
    """

    def begin(self) -> None:
        """Open the update, closing one that failed before."""
        ...

    def receive(self, bucket: Announcement, group_name: str) -> None:
        """Receive one bucket and load it; returns when it is loaded."""
        ...

    def end(self) -> None:
        """Close the update; the server makes of the weights what it computes with."""
        ...


class Sessionless:
    """SGLang before 0.5.21, and xorl-sglang's `dev`."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def begin(self) -> None:
        pass

    def receive(self, bucket: Announcement, group_name: str) -> None:
        body = _body(bucket, group_name) | {"flush_cache": False}
        self._receiver.call("POST", "/update_weights_from_distributed", body)

    def end(self) -> None:
        pass


class InSession(Sessionless):
    """SGLang since 0.5.21, which refuses an update outside of a session."""

    def begin(self) -> None:
        try:
            self._receiver.call("POST", "/begin_weight_update", {})
        except ReceiverError as error:
            if error.status is None:
                raise
            with contextlib.suppress(ReceiverError):
                self.end()
            self._receiver.call("POST", "/begin_weight_update", {})

    def end(self) -> None:
        self._receiver.call("POST", "/end_weight_update", {})


class TwoPhase(Sessionless):
    """xorl-sglang's `main`: a bucket is awaited in the background, then completed."""

    def receive(self, bucket: Announcement, group_name: str) -> None:
        way = {"transport": "nccl_broadcast", "load_format": FORMATS[bucket.in_one_piece]}
        self._receiver.call("POST", "/prepare_weights_update", _body(bucket, group_name) | way)
        closing = {"group_name": group_name, "flush_cache": False, "run_post_process_weights": bucket.last}
        self._receiver.call("POST", "/complete_weights_update", closing | way)


def dialect_of(receiver: Receiver) -> Dialect:
    if receiver.has("/prepare_weights_update"):
        return TwoPhase(receiver)
    return InSession(receiver) if receiver.has("/begin_weight_update") else Sessionless(receiver)


def takes_buckets(info: ServerInfo) -> bool:
    """Whether many tensors may come in one piece. A server whose version is no release's is taken for a new one."""
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", info.version or "")
    return release is None or tuple(map(int, release.groups())) >= WITH_BUCKETS


def _body(bucket: Announcement, group_name: str) -> dict[str, object]:
    return {
        "names": bucket.names,
        "dtypes": bucket.dtypes,
        "shapes": bucket.shapes,
        "group_name": group_name,
        "load_format": FORMATS[bucket.in_one_piece],
    }
