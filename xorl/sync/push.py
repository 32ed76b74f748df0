"""Streams a model's weights into inference servers: pause, send buckets, commit, resume."""

import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from xorl.config import is_loopback
from xorl.engine.commands import SyncReport, SyncWeights
from xorl.errors import InvalidRequest, NonFinite
from xorl.quantization import Fp8
from xorl.sync import terms
from xorl.sync.formats import Weight, one_by_one, pieces, wire_items
from xorl.sync.link import Link, LinkFailed, Members
from xorl.sync.plan import Bucket, lay_out
from xorl.sync.targets import Target, Targets
from xorl_kernels.fp8_quantize import Packer

BLACKWELL = (10, 0)


class Plan(NamedTuple):
    """What is sent, and from what it is made."""

    buckets: list[Bucket]
    weights: Mapping[str, Weight]
    fp8: Fp8 | None


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
            NonFinite: a weight holds a NaN or an infinity, and no endpoint got anything.
        """
        _refuse_nonfinite(weights)
        phases = Phases()
        with phases.timed("total"), Targets(command.endpoints, self._timeout_s) as targets:
            with phases.timed("probe"):
                plan = _plan(weights, self._agree(command, weights, targets), command.bucket_bytes)
            if targets.live:
                with targets.paused(command.pause_mode):
                    self._update(command, plan, targets, phases)
            endpoints = targets.report()
        sent = plan.buckets if any(endpoint.success for endpoint in endpoints) else []
        return SyncReport(
            transfer_time=phases.seconds.get("transfer", 0.0),
            total_bytes=sum(bucket.num_bytes for bucket in sent),
            num_parameters=sum(len(bucket.items) for bucket in sent),
            num_buckets=len(sent),
            endpoints=endpoints,
            seconds=phases.seconds,
        )

    def _agree(self, command: SyncWeights, weights: Sequence[Weight], targets: Targets) -> Fp8 | None:
        """The form of weights that all take who stay in: the one asked for, or the first one's own."""
        targets.each(_ask_info)
        on_cuda = self._device.type == "cuda"
        blackwell = on_cuda and torch.cuda.get_device_capability(self._device) >= BLACKWELL
        agreed: list[Fp8 | None] = []
        for target in targets.live:
            served = terms.read_served(target.info.model_path)
            ranks = target.endpoint.world_size
            try:
                form = terms.taken_form(
                    target.info, served, command.quantization, weights, ranks=ranks, blackwell=blackwell
                )
                if agreed and form != agreed[0]:
                    raise terms.Unfit(
                        "it takes weights in another form than those before it; sync it as a pool of its own"
                    )
            except terms.Unfit as unfit:
                target.problem = f"{target.receiver.address}: {unfit}"
                continue
            agreed.append(form)
            if served is None:
                target.remarks.append(
                    f"its model's config, {target.info.model_path}, is not readable here, so names, shapes and "
                    "quantization are unchecked"
                )
        return agreed[0] if agreed else command.quantization

    def _update(self, command: SyncWeights, plan: Plan, targets: Targets, phases: "Phases") -> None:
        """Try until all who are left have everything. Each try after the first leaves at least one endpoint behind."""
        first = True
        while targets.live:
            try:
                with phases.timed("connect"):
                    link = self._connect(command, targets, first=first)
                if not targets.each(lambda target: target.receiver.begin_update()):
                    continue  # with a link that has no place for those who refused
                with phases.timed("transfer"):
                    _stream(link, plan, targets, command.bucket_bytes, first=first)
                break
            except LinkFailed:
                self._link = None
                self._failed_before = True
            except NonFinite as error:
                if not any(target.touched for target in targets.live):
                    raise
                for target in targets.live:
                    target.problem = str(error)
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


def _refuse_nonfinite(weights: Sequence[Weight]) -> None:
    """Look at what training changes, before anything is sent.

    A base weight with a NaN, or a merge that overflows, is found when its bucket is made.
    """
    trained = [
        (weight.name, tensor)
        for weight in weights
        for tensor in (weight.tensor, *(weight.lora[:2] if weight.lora else ()))
        if tensor.requires_grad
    ]
    if trained:
        finite = torch.stack([tensor.detach().isfinite().all() for _, tensor in trained]).tolist()
        _refuse([name for (name, _), is_finite in zip(trained, finite, strict=True) if not is_finite])


def _refuse(nonfinite: Sequence[str]) -> None:
    if nonfinite:
        raise NonFinite(f"{', '.join(nonfinite)}: NaN or infinite, so nothing of it is sent")


def _ask_info(target: Target) -> None:
    target.info = target.receiver.server_info()


def _plan(weights: Sequence[Weight], fp8: Fp8 | None, bucket_bytes: int) -> Plan:
    weights = one_by_one(weights)
    buckets = lay_out(wire_items(weights, fp8), bucket_bytes)
    return Plan(buckets, {weight.name: weight for weight in weights}, fp8)


def _stream(link: Link, plan: Plan, targets: Targets, bucket_bytes: int, *, first: bool) -> None:
    """Produce each bucket while the one before is on the wire.

    Raises:
        LinkFailed: somebody fell out, so the others have to be sent everything again.
        NonFinite: a weight is; its bucket was not sent.
    """
    for bucket in plan.buckets:
        try:
            data = _fill(link, bucket, plan, bucket_bytes)
        finally:
            link.settle(lenient=first)
        link.send(bucket, data, targets)
    link.settle(lenient=first)


def _fill(link: Link, bucket: Bucket, plan: Plan, bucket_bytes: int) -> Tensor:
    """The bucket's bytes; for a weight that is larger than a bucket, in memory that goes when they are sent."""
    packer = Packer(pieces(bucket, plan.weights, plan.fp8))
    if bucket.num_bytes <= bucket_bytes:
        data = link.slot(bucket.num_bytes)
    else:
        data = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=packer.pieces[0].weight_OI.device)
    packer.write(data)
    _refuse(packer.nonfinite())
    return data


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
