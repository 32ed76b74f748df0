"""Streams a model's weights into inference servers: pause, send buckets, commit, resume."""

import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from xorl.config import is_loopback
from xorl.engine.commands import SyncReport, SyncWeights
from xorl.errors import InvalidRequest
from xorl.sync.formats import Weight, check_quantization, refusal, wire_specs
from xorl.sync.link import Link, LinkFailed, Members
from xorl.sync.plan import Bucket, TensorSpec, lay_out
from xorl.sync.receiver import ReceiverError
from xorl.sync.targets import Target, Targets


class WeightSync:
    """Pushes weights, and keeps the update group from one push to the next."""

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        """`timeout_s` limits each answer of an endpoint; weights are produced on `device`, and CUDA goes over NCCL."""
        self._timeout_s = timeout_s
        self._device = device
        self._link: Link | None = None
        self._failed_before = False

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def push(self, command: SyncWeights, weights: Sequence[Weight]) -> SyncReport:
        """Send all weights to all endpoints, as one update.

        An endpoint that refuses, dies or stalls falls out and is reported; the others get the whole update, from the
        start again if need be. One that may hold a mixture of weights stays paused until a sync with it succeeds.

        Raises:
            InvalidRequest: a weight cannot be sent, or this machine cannot be reached as the command says.
        """
        check_quantization(command.quantization)
        buckets = lay_out(wire_specs(weights), command.bucket_bytes)
        by_name = {weight.name: weight for weight in weights}
        phases = Phases()
        with phases.timed("total"), Targets(command.endpoints, self._timeout_s) as targets:
            with phases.timed("probe"):
                targets.each(_probe)
            if targets.live:
                with targets.paused(command.pause_mode):
                    self._update(command, buckets, by_name, targets, phases)
            endpoints = targets.report()
        sent = buckets if any(endpoint.success for endpoint in endpoints) else []
        return SyncReport(
            transfer_time=phases.seconds.get("transfer", 0.0),
            total_bytes=sum(bucket.num_bytes for bucket in sent),
            num_parameters=sum(len(bucket.tensors) for bucket in sent),
            num_buckets=len(sent),
            endpoints=endpoints,
            seconds=phases.seconds,
        )

    def _update(
        self,
        command: SyncWeights,
        buckets: Sequence[Bucket],
        weights: Mapping[str, Weight],
        targets: Targets,
        phases: "Phases",
    ) -> None:
        """Try until all who are left have everything. Each try after the first leaves at least one endpoint behind."""
        first = True
        while targets.live:
            try:
                with phases.timed("connect"):
                    link = self._connect(command, targets, first=first)
                if not targets.each(lambda target: target.receiver.begin_update()):
                    continue  # with a link that has no place for those who refused
                with phases.timed("transfer"):
                    _stream(link, buckets, weights, targets, command.bucket_bytes, first=first)
                break
            except LinkFailed:
                self._link = None
                self._failed_before = True
            finally:
                first = False
        with phases.timed("commit"):
            _commit(command, targets)

    def _connect(self, command: SyncWeights, targets: Targets, *, first: bool) -> Link:
        """The kept group if it has the members that are wanted now, else a new one."""
        endpoints = tuple(target.endpoint for target in targets.live)
        address = command.master_address or _own_address(command)
        members = Members(endpoints, address, command.master_port, command.group_name)
        if self._link is not None and self._link.members == members:
            return self._link
        self.close()
        name = command.group_name
        if not first or self._failed_before:
            # Receivers may still have the group of that name, and to destroy one that failed can hang them.
            name = f"{name}-{secrets.token_hex(4)}"
        try:
            self._link = Link.open(members, name, targets, self._device, self._timeout_s, lenient=first)
        except OSError as error:
            where = f"{address}:{members.port}"
            raise InvalidRequest(f"master_address, master_port: cannot listen at {where}: {error}") from None
        return self._link


class Phases:
    """Seconds spent, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def _probe(target: Target) -> None:
    reason = refusal(target.receiver.server_info(), target.endpoint.world_size)
    if reason:
        raise ReceiverError(f"{target.receiver.address}: {reason}")


def _stream(
    link: Link,
    buckets: Sequence[Bucket],
    weights: Mapping[str, Weight],
    targets: Targets,
    bucket_bytes: int,
    *,
    first: bool,
) -> None:
    """Produce each bucket while the one before is on the wire.

    Raises:
        LinkFailed: somebody fell out, so the others have to be sent everything again.
    """
    for bucket in buckets:
        try:
            data = _fill(link, bucket, weights, bucket_bytes)
        finally:
            link.settle(lenient=first)
        link.send(bucket, data, targets)
    link.settle(lenient=first)


def _fill(link: Link, bucket: Bucket, weights: Mapping[str, Weight], bucket_bytes: int) -> Tensor:
    """The bucket's bytes; one tensor that is larger than a bucket stays where it is."""
    if bucket.num_bytes > bucket_bytes:
        (spec,) = bucket.tensors
        return _produce(weights[spec.name], spec).contiguous().flatten().view(torch.uint8)
    data = link.slot(bucket.num_bytes)
    for spec, offset in zip(bucket.tensors, bucket.offsets, strict=True):
        value = _produce(weights[spec.name], spec)
        data[offset : offset + spec.num_bytes].view(value.dtype).view(value.shape).copy_(value)
    return data


def _produce(weight: Weight, spec: TensorSpec) -> Tensor:
    with torch.no_grad():
        value = weight.produce().detach()
    assert (value.dtype, value.shape) == (weight.dtype, spec.shape), f"{spec} is {value.dtype} {value.shape}"
    return value


def _commit(command: SyncWeights, targets: Targets) -> None:
    """Close the session, name the version and drop what was computed with the old weights, while still paused."""
    targets.each(lambda target: target.receiver.end_update())
    for target in targets.live:
        target.whole = True
    version = command.weight_version
    if version is not None:
        targets.each_may_refuse(lambda target: target.receiver.set_weight_version(version))
    if _flushes(command):
        targets.each_may_refuse(lambda target: target.receiver.flush_cache())


def _flushes(command: SyncWeights) -> bool:
    """Whether to drop cached keys and values. `auto` does, except for `in_place`, whose requests go on with theirs."""
    match command.cache_mode:
        case "flush":
            return True
        case "none":
            return command.flush_cache
        case "auto":
            return command.flush_cache or command.pause_mode != "in_place"


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
