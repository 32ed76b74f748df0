"""Pushes a model's weights into inference servers: probe, pause, send, name the version, check, resume."""

from collections.abc import Sequence

import torch

from xorl.engine.commands import SyncReport, SyncWeights
from xorl.errors import InvalidRequest, NonFinite
from xorl.sync import terms
from xorl.sync.dialects import takes_buckets
from xorl.sync.disk import Shelf
from xorl.sync.formats import Weight
from xorl.sync.groups import Groups, Party
from xorl.sync.phases import Phases
from xorl.sync.produce import Plan, refuse_nonfinite
from xorl.sync.targets import Target, Targets, reaching
from xorl.sync.terms import Unfit, Way
from xorl.sync.verify import Expected, is_foretold, verify

BLACKWELL = (10, 0)


class WeightSync:
    """Pushes weights, and keeps the update groups from one push to the next."""

    def __init__(self, timeout_s: float, device: torch.device, shelf: Shelf | None = None) -> None:
        """
        Args:
            timeout_s: limits each answer of an endpoint.
            device: where weights are produced; CUDA's go over NCCL.
            shelf: for servers that cannot join an update group; without it they are refused.
        """
        self._device = device
        self._shelf = shelf
        self._timeout_s = timeout_s
        self._groups = Groups(timeout_s, device)

    def close(self) -> None:
        self._groups.close()

    def push(self, command: SyncWeights, weights: Sequence[Weight]) -> SyncReport:
        """Send all weights to all endpoints, as one update; each gets them in the form in which it serves them.

        An endpoint that refuses, dies or stalls falls out and is reported; the others get the whole update, from the
        start again if need be. One that may hold a mixture of weights stays paused until a sync with it succeeds.

        Raises:
            InvalidRequest: a weight cannot be sent, or this machine cannot be reached as the command says.
            NonFinite: a weight holds a NaN or an infinity, and no endpoint got anything.
        """
        refuse_nonfinite(weights)
        phases = Phases()
        with phases.timed("total"), reaching(command.endpoints, self._timeout_s) as targets:
            with phases.timed("probe"):
                parties = self._parties(command, weights, targets)
            if targets.live:
                with targets.paused(command.pause_mode, phases):
                    self._deliver(command, parties, targets, phases)
                    with phases.timed("commit"):
                        _commit(command, targets)
                    if command.verify:
                        with phases.timed("verify"):
                            for party in parties:
                                verify(party.targets, party.expected)
            endpoints = targets.report()
        sent = [party.plan for party in parties if any(target.whole for target in party.targets.live)]
        return SyncReport(
            transfer_time=phases.seconds.get("transfer", 0.0) + phases.seconds.get("disk", 0.0),
            total_bytes=sum(plan.num_bytes for plan in sent),
            num_parameters=max((len(plan.weights) for plan in sent), default=0),
            num_buckets=sum(len(plan.buckets) for plan in sent),
            endpoints=endpoints,
            seconds=phases.seconds,
        )

    def _parties(self, command: SyncWeights, weights: Sequence[Weight], targets: Targets) -> list[Party]:
        targets.each(Target.probe)
        for target in targets.live:
            try:
                target.way = self._way(command, weights, target)
            except Unfit as unfit:
                target.fail(f"{target.receiver.address}: {unfit}")
        parties: list[Party] = []
        ways = dict.fromkeys(target.way for target in targets.live)
        for way in sorted(ways, key=lambda way: way.by == "disk"):
            party = targets.among(lambda target, way=way: target.way == way)
            foretold = [target for target in party.live if command.verify and is_foretold(target.info)]
            expected = {target: Expected(target.info) for target in foretold}
            parties.append(Party(way, Plan.of(weights, way.fp8, command.bucket_bytes), party, expected))
        return parties

    def _way(self, command: SyncWeights, weights: Sequence[Weight], target: Target) -> Way:
        """
        Raises:
            Unfit: the endpoint cannot take the weights.
        """
        info, ranks = target.info, target.endpoint.world_size
        served = terms.read_served(info.model_path)
        on_cuda = self._device.type == "cuda"
        blackwell = on_cuda and torch.cuda.get_device_capability(self._device) >= BLACKWELL
        fp8 = terms.taken_form(info, served, command.quantization, weights, ranks=ranks, blackwell=blackwell)
        if served is None:
            target.remarks.append(
                f"its model's config, {info.model_path}, is not readable here, so names, shapes and quantization are "
                "unchecked"
            )
        hindrance = terms.no_group(info, self._device)
        if hindrance is None:
            return Way(fp8, "buckets" if takes_buckets(info) else "tensors")
        if self._shelf is None:
            raise Unfit(hindrance)
        target.remarks.append(f"{hindrance}, so it loaded the weights from disk")
        return Way(fp8, "disk")

    def _deliver(self, command: SyncWeights, parties: Sequence[Party], targets: Targets, phases: Phases) -> None:
        """
        Raises:
            NonFinite, InvalidRequest: nothing can be sent, and nobody has got anything.
        """
        try:
            self._groups.close(beyond=sum(party.way.by != "disk" for party in parties))
            for number, party in enumerate(parties):  # those who read from disk come last
                if party.way.by == "disk":
                    self._shelve(command, party, party.targets, phases)
                else:
                    self._send(number, command, party, phases)
        except (NonFinite, InvalidRequest) as error:
            if not any(target.touched for target in targets.live):
                raise
            for target in targets.live:
                if not target.whole:
                    target.fail(str(error))

    def _send(self, number: int, command: SyncWeights, party: Party, phases: Phases) -> None:
        refused = self._groups.send(number, party, command, phases)
        if refused and self._shelf is not None:
            for target in refused:
                target.remarks.append(f"{target.problem}, so it loaded the weights from disk")
                target.problem = None
            self._shelve(command, party, party.targets.among(lambda target: target in refused), phases)

    def _shelve(self, command: SyncWeights, party: Party, targets: Targets, phases: Phases) -> None:
        assert self._shelf is not None
        with phases.timed("disk"):
            self._shelf.deliver(party.plan, targets, command.weight_version, list(party.expected.values()))


def _commit(command: SyncWeights, targets: Targets) -> None:
    """Name the version and drop what was computed with the old weights, while still paused."""
    targets.each_may_refuse(lambda target: target.receiver.set_weight_version(command.weight_version))
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
