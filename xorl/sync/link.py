"""Sends buckets to the receivers of an update group, and finds out who is at fault when that fails."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xorl.engine.commands import Endpoint
from xorl.sync.broadcast import BucketBroadcast, GroupHost, bucket_broadcast
from xorl.sync.dialects import Announcement
from xorl.sync.plan import Bucket
from xorl.sync.receiver import ReceiverError
from xorl.sync.targets import Ask, Target, Targets, failure, reaching

WIRE_SHARE = 0.75
"""Of the time that an endpoint has for its answer: when the wire has timed out, the others can still give theirs."""

FAREWELL_TIMEOUT_S = 5.0


class LinkFailed(Exception):
    """The group is of no use any more. Those at fault are out of the sync, so with the others a new one may work."""


EAGER_AFTER_S = 2.0
"""A receiver that is still silent then waits, in its NCCL, for ours; stock SGLang's is made at the first broadcast."""


class Members(NamedTuple):
    """Who is in an update group, where they meet and how buckets go; a kept group serves while this stays equal."""

    endpoints: tuple[Endpoint, ...]
    address: str
    port: int
    name: str
    in_one_piece: bool


class Flight(NamedTuple):
    """A bucket's way: on it from `start`, the wire free at `wire_free`, loaded by all at `stop`."""

    start: float
    wire_free: float
    stop: float


class Link:
    """The sender's end of an update group: rank 0; the endpoints' ranks follow in their order.

    SGLang takes one bucket at a time, so one is announced and on the wire while the next one is produced.
    """

    def __init__(
        self,
        members: Members,
        name: str,
        host: GroupHost,
        broadcast: BucketBroadcast,
        joined: "Answers",
        device: torch.device,
    ) -> None:
        self.members = members
        self._device = device
        self._name = name
        self._host = host
        self._wire: list[BucketBroadcast] = [broadcast]  # owns the group; empty once we hung up
        self._answers = joined
        self._sent_at: float | None = None

    @classmethod
    def open(
        cls, members: Members, name: str, targets: Targets, device: torch.device, timeout_s: float, *, lenient: bool
    ) -> Self:
        """Listen, then invite all targets at once and wait until they have come.

        Args:
            name: what the group is called this time; a name is taken while any receiver still has such a group.
            lenient: see `Answers.blame`.

        Raises:
            LinkFailed: somebody did not come.
            OSError: this machine cannot listen at the members' address and port.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"
        host = GroupHost(members.address, members.port, WIRE_SHARE * timeout_s)
        world_size = 1 + sum(endpoint.world_size for endpoint in members.endpoints)
        ranks: dict[Endpoint, int] = {}
        for endpoint in members.endpoints:
            ranks[endpoint] = 1 + sum(earlier.world_size for earlier in ranks)

        def invite(target: Target) -> None:
            target.receiver.join_group(host.address, host.port, ranks[target.endpoint], world_size, name, backend)

        def dismiss(failed: Sequence[Target]) -> None:
            host.dismiss(sum(target.endpoint.world_size for target in targets.live if target not in failed))

        answers = Answers(targets, invite, on_failure=dismiss)
        try:
            group = host.form(world_size, name, backend)
        except RuntimeError as error:
            host.close()
            raise answers.blame(f"the update group did not form: {error}", lenient=lenient) from None
        if backend == "nccl" and not answers.complete_within(EAGER_AFTER_S):
            _connect_eagerly(group, device)
        answers.check()
        broadcast = bucket_broadcast(group, device, WIRE_SHARE * timeout_s)
        return cls(members, name, host, broadcast, answers, device)

    def slot(self, num_bytes: int) -> Tensor:
        """The buffer to fill for the next `send`.

        Raises:
            RuntimeError: what is on the wire has failed; `settle` tells why.
        """
        if not self.members.in_one_piece:  # a slot travels whole
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._wire[0].slot(num_bytes)

    def send(self, bucket: Bucket, data: Tensor, targets: Targets, *, last: bool) -> None:
        """Announce a bucket and start its broadcast; the one before must be settled.

        Args:
            data: its bytes, a slot or any flat uint8 tensor; it must stay as it is until `settle`.
        """
        tensors = bucket.tensors
        announcement = Announcement(
            names=[spec.name for spec in tensors],
            dtypes=[spec.dtype for spec in tensors],
            shapes=[spec.shape for spec in tensors],
            in_one_piece=self.members.in_one_piece,
            last=last,
        )

        def announce(target: Target) -> None:
            target.touched = True
            target.dialect.receive(announcement, self._name)

        self._sent_at = time.perf_counter()
        self._answers = Answers(targets, announce, on_failure=self._abort)
        pieces = [data] if self.members.in_one_piece else data.split([spec.num_bytes for spec in tensors])
        with contextlib.suppress(RuntimeError):  # `settle` meets it again
            for piece in pieces:
                self._wire[0].send(piece)

    def settle(self, *, lenient: bool) -> Flight | None:
        """Wait until everything sent is loaded; returns how the last bucket fared, if there was one since.

        Raises:
            LinkFailed: somebody did not receive or could not load it.
        """
        try:
            self._wire[0].finish()
        except RuntimeError as error:
            self._hang_up()
            raise self._answers.blame(str(error), lenient=lenient) from None
        wire_free = time.perf_counter()
        self._answers.check()
        sent_at, self._sent_at = self._sent_at, None
        return None if sent_at is None else Flight(sent_at, wire_free, self._answers.last_at)

    def close(self) -> None:
        """Leave together with the receivers, so that the group's name is free again."""
        with reaching(self.members.endpoints, FAREWELL_TIMEOUT_S) as targets:
            targets.each(lambda target: target.receiver.leave_group(self._name))
        self._hang_up()

    def _abort(self, _: Sequence[Target]) -> None:
        for broadcast in self._wire:
            broadcast.abort()

    def _hang_up(self) -> None:
        """Let go of the group, so that the receivers see it closed: at once, or when what is on the wire times out."""
        self._host.close()
        threading.Thread(target=self._wire.clear, name="sync-hang-up").start()  # may have to wait for the wire


def _connect_eagerly(group: ProcessGroup, device: torch.device) -> None:
    """Make NCCL's communicator now, for receivers that do so before they answer (xorl-sglang's).

    Without an end if one of them is gone by now, so it is not waited for; their answers tell.
    """
    connect = group._get_backend(device).eager_connect_single_device
    threading.Thread(target=connect, args=(device,), name="sync-eager-nccl", daemon=True).start()


class Answers:
    """What all targets answer to one request that they act on together.

    Attributes:
        last_at: when the latest of them came.
    """

    def __init__(self, targets: Targets, ask: Ask, on_failure: Callable[[Sequence[Target]], None]) -> None:
        """Ask all who are in. `on_failure` gets those who have failed as soon as one has, in another thread."""
        self._failed: list[Target] = []  # in order of time
        self.last_at = 0.0

        def watched(target: Target) -> None:
            try:
                ask(target)
            except ReceiverError:
                self._failed.append(target)
                on_failure(self._failed)
                raise
            finally:
                self.last_at = time.perf_counter()

        self._answers = [(target, targets.start(target, watched)) for target in targets.live]

    def complete_within(self, seconds: float) -> bool:
        return not wait([answer for _, answer in self._answers], seconds).not_done

    def check(self) -> None:
        """Wait for all; the wire was fine, so whoever failed did so by itself.

        Raises:
            LinkFailed: somebody did, and is out.
        """
        failures = self._failures()
        for target, error in failures.items():
            target.fail(error)
        if failures:
            raise LinkFailed

    def blame(self, what: str, *, lenient: bool) -> LinkFailed:
        """Wait for all, and put out those who made the wire fail.

        They are those who do not answer; if all do, the first who failed, since the others may only have met the end
        of the group; if nobody failed, all.

        Args:
            what: how the wire failed.
            lenient: put out only who does not answer: a group that was kept, or a name that was free, may be neither.
        """
        failures = self._failures()
        lost = {target: error for target, error in failures.items() if error.status is None}
        if lost or lenient:
            guilty = lost
        elif self._failed:
            guilty = {self._failed[0]: failures[self._failed[0]]}
        else:
            guilty = dict.fromkeys((target for target, _ in self._answers), what)
        for target, error in guilty.items():
            target.fail(error)
        return LinkFailed(what)

    def _failures(self) -> dict[Target, ReceiverError]:
        failures = {target: failure(answer) for target, answer in self._answers}
        return {target: error for target, error in failures.items() if error is not None}
