"""Predicts how long a sync takes, from its buckets."""

from collections.abc import Sequence
from math import ceil, log2
from typing import Literal, NamedTuple

from xorl.sync.plan import Bucket

Backend = Literal["nccl", "gloo"]


class Costs(NamedTuple):
    """What bounds a sync, in bytes a second and seconds. Rates count the bytes of buckets.

    The defaults but for `ingress` are for GPUs and unproven on them; `bench.sync` measures them all where it runs.

    Attributes:
        ingress: what the slowest receiver takes from the link.
        load: what a receiver puts in its place; SGLang does so before it takes the next bucket. Default: a copy of the
            H200, 4.3 TB/s read and written.
        produce: what the sender gathers, merges, quantises and packs. Default: the same copy, of two bytes a weight
            into one of FP8, at the 85% that the kernel is built for.
        bucket_s: announcement over HTTP, launches, and the answer. Default: SGLang 0.5.23's on a CPU over loopback.
        pause_s: what frames the buckets: pause, begin; end, version, flush, resume.
    """

    ingress: float
    load: float = 4.3e12 / 2
    produce: float = 0.85 * 4.3e12 / 3
    bucket_s: float = 6e-3
    pause_s: float = 0.05


class Forecast(NamedTuple):
    """Seconds from request to resumed, by what takes them.

        wire    = bytes · sends / ingress
        load    = (bytes - last bucket) / load
        buckets = count · bucket_s
        lag     = max(0, bytes / produce - wire - load - buckets)   production that these do not hide
        fill    = first bucket / produce                            nothing is on the wire yet
        drain   = last bucket / load                                nothing is on the wire any more
        pause   = pause_s

    Source: the sender announces a bucket when the one before is loaded, and meanwhile produces it (xorl.sync.push);
    sglang 0.5.23 receives and loads in one turn of its scheduler; NCCL's ring sends every byte once from each member;
    gloo's broadcast is a binomial tree, whose root sends every byte to ceil(log2(members)) others.
    """

    wire_s: float
    load_s: float
    buckets_s: float
    lag_s: float
    fill_s: float
    drain_s: float
    pause_s: float

    @property
    def total_s(self) -> float:
        return sum(self)


def forecast(buckets: Sequence[Bucket], costs: Costs, members: int, backend: Backend) -> Forecast:
    """
    Args:
        members: ranks in the update group, the sender's too.
    """
    sizes = [bucket.num_bytes for bucket in buckets] or [0]
    wire_s = sum(sizes) * sends(members, backend) / costs.ingress
    load_s = sum(sizes[:-1]) / costs.load
    buckets_s = len(buckets) * costs.bucket_s
    return Forecast(
        wire_s=wire_s,
        load_s=load_s,
        buckets_s=buckets_s,
        lag_s=max(0.0, sum(sizes) / costs.produce - wire_s - load_s - buckets_s),
        fill_s=sizes[0] / costs.produce,
        drain_s=sizes[-1] / costs.load,
        pause_s=costs.pause_s,
    )


def sends(members: int, backend: Backend) -> int:
    """How often the busiest member of a group sends each byte of a broadcast."""
    return 1 if backend == "nccl" else ceil(log2(members))
