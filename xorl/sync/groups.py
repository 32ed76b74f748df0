"""Keeps update groups from one sync to the next, and sends plans over them."""

import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xorl.config import is_loopback
from xorl.engine.commands import SyncWeights
from xorl.errors import InvalidRequest
from xorl.sync.link import Flight, Link, LinkFailed, Members
from xorl.sync.phases import Phases, Span
from xorl.sync.plan import Bucket
from xorl.sync.produce import Plan, in_new_memory, tensors_in, write
from xorl.sync.targets import Target, Targets
from xorl.sync.terms import Way
from xorl.sync.verify import Expected


@dataclass
class Party:
    """The endpoints that take weights in one way, what they are sent, and what they must hold then."""

    way: Way
    plan: Plan
    targets: Targets
    expected: Mapping[Target, Expected]


class Groups:
    """One update group for each party of a sync; the i-th has port master_port + i."""

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        self._timeout_s = timeout_s
        self._device = device
        self._links: dict[int, Link] = {}
        self._failed_before = False

    def close(self, beyond: int = 0) -> None:
        """End the groups from the given number on."""
        for number in [number for number in self._links if number >= beyond]:
            self._links.pop(number).close()

    def send(self, number: int, party: Party, command: SyncWeights, phases: Phases) -> list[Target]:
        """Try until all who are left have everything. Each try after the first leaves at least one endpoint behind.

        Args:
            number: of the party among those of this sync.
            party: who fails is out, who is left has all.

        Returns:
            Those of the fallen who refused to join the group.

        Raises:
            NonFinite: a weight is, and its bucket was not sent.
            InvalidRequest: this machine cannot be reached as the command says.
        """
        targets, refused = party.targets, list[Target]()
        first = True
        while targets.live:
            invited = targets.live
            try:
                with phases.timed("connect"):
                    link = self._connect(number, party, command, first=first)
                    begun = targets.each(lambda target: target.dialect.begin())
            except LinkFailed:
                self._forget(number)
                refused += [target for target in invited if target.refused]
            else:
                if begun and self._stream(number, link, party, phases, first=first):
                    break
            first = False
        with phases.timed("commit"):
            targets.each(lambda target: target.dialect.end())
        for target in targets.live:
            target.whole = True
        return refused

    def _stream(self, number: int, link: Link, party: Party, phases: Phases, *, first: bool) -> bool:
        try:
            with phases.timed("transfer"):
                _Stream(link, party, phases, lenient=first).run()
        except LinkFailed:
            self._forget(number)
            return False
        return True

    def _forget(self, number: int) -> None:
        self._links.pop(number, None)
        self._failed_before = True

    def _connect(self, number: int, party: Party, command: SyncWeights, *, first: bool) -> Link:
        """The kept group if it has the members that are wanted now, else a new one."""
        members = Members(
            tuple(target.endpoint for target in party.targets.live),
            command.master_address or _own_address(command),
            command.master_port and command.master_port + number,
            command.group_name,
            in_one_piece=party.way.by == "buckets",
        )
        kept = self._links.get(number)
        if kept is not None and kept.members == members:
            return kept
        if kept is not None:
            self._links.pop(number).close()
        name = command.group_name
        if not first or self._failed_before:
            # Receivers may still have the group of that name, and to destroy one that failed can hang them.
            name = f"{name}-{secrets.token_hex(4)}"
        try:
            link = Link.open(members, name, party.targets, self._device, self._timeout_s, lenient=first)
        except OSError as error:
            where = f"{members.address}:{members.port}"
            raise InvalidRequest(f"master_address, master_port: cannot listen at {where}: {error}") from None
        self._links[number] = link
        return link


class _Stream:
    """One try to send a plan: each bucket is produced while the one before is on the wire."""

    def __init__(self, link: Link, party: Party, phases: Phases, *, lenient: bool) -> None:
        self._link = link
        self._plan = party.plan
        self._targets = party.targets
        self._expected = party.expected.values()
        self._phases = phases
        self._lenient = lenient

    def run(self) -> None:
        """
        Raises:
            LinkFailed: somebody fell out, so the others have to be sent everything again.
            NonFinite: a weight is; its bucket was not sent.
        """
        for each in self._expected:
            each.clear()
        for bucket in self._plan.buckets:
            start = time.perf_counter()
            try:
                data = self._produce(bucket)
            finally:
                produced = Span(start, time.perf_counter())
                flight = self._link.settle(lenient=self._lenient)
                self._account(produced, flight)
            self._link.send(bucket, data, self._targets, last=bucket is self._plan.buckets[-1])
        self._account(None, self._link.settle(lenient=self._lenient))

    def _produce(self, bucket: Bucket) -> Tensor:
        """The bucket's bytes, in a slot of the wire unless it is too large for one."""
        packer = self._plan.packer(bucket)
        if self._plan.is_oversized(bucket):
            data = in_new_memory(packer)
        else:
            data = self._link.slot(bucket.num_bytes)
            write(packer, data)
        for each in self._expected:
            each.add(bucket, tensors_in(bucket, data))
        return data

    def _account(self, produced: Span | None, flight: Flight | None) -> None:
        if produced is not None:
            self._phases.add("produce", produced.stop - produced.start)
        if flight is not None:
            self._phases.add("broadcast", min(flight.wire_free, flight.stop) - flight.start)
            self._phases.add("load", max(0.0, flight.stop - flight.wire_free))
            if produced is not None:
                self._phases.add("hidden", produced.common(Span(flight.start, flight.stop)))


def _own_address(command: SyncWeights) -> str:
    """Under which all endpoints reach this machine."""
    far = [endpoint for endpoint in command.endpoints if not is_loopback(endpoint.host)]
    if not far:
        return "127.0.0.1"
    try:
        (family, kind, _, _, there), *_ = socket.getaddrinfo(far[0].host, far[0].port, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing, but picks the way
            return probe.getsockname()[0]
    except OSError as error:
        raise InvalidRequest(f"master_address: no way to {far[0].host}: {error}; give this machine's address") from None
