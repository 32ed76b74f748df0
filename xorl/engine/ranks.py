"""Says what several processes of the engine do together.

Every rank runs the same steps in the same order, each on its share of the datums. A failure that all ranks share is a
failed request; one that only some have leaves them out of step, which ends the engine.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from xorl.engine.commands import AnyCommand
from xorl.errors import EngineLost, InternalError, XorlError, by_name

FIRST = 0
"""The rank that hears the control plane and answers it."""

PATIENCE = timedelta(hours=1)
"""How long a rank waits for the others: longer than the first one is busy alone, as with a weight sync."""

T = TypeVar("T")


class RankDivergence(Exception):
    """What ranks do together went differently on some of them. Nobody catches it: it ends the process."""


class Order(msgspec.Struct, frozen=True):
    """A step, as the first rank tells it; batches have at most `max_tokens`. No commands: a sign of life."""

    max_tokens: int = 0
    commands: list[AnyCommand] = []


class OneRank:
    """An engine of one process: whatever ranks do together is done already."""

    rank, size, is_first = FIRST, 1, True
    host_group: dist.ProcessGroup | None = None

    def tell(self, order: Order) -> None:
        pass

    def common(self, error: Exception | None) -> Exception | None:
        return error

    def refuse_difference(self, facts: Sequence[int]) -> None:
        pass

    def any(self, fact: bool) -> bool:
        return fact

    def from_first(self, make: Callable[[], T]) -> T:
        return make()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        pass

    def sum_delivered(self, tensors: Sequence[Tensor]) -> None:
        pass


ONE_RANK = OneRank()


class ManyRanks:
    """One of several processes, as torchrun's variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

    Each stage of the engine has a group of its own, since a group wants its operations in one order on all ranks.

    Attributes:
        host_group: gloo, of the compute stage; the default group is that stage's too, over NCCL for tensors on CUDA.
    """

    def __init__(self) -> None:
        on_cuda = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.is_first = self.rank == FIRST
        self.host_group = _gloo()
        self._orders, self._deliveries = _gloo(), _gloo()

    def tell(self, order: Order) -> None:
        """Prepare stage of the first rank: what all others `hear` next."""
        body = torch.frombuffer(bytearray(msgspec.msgpack.encode(order)), dtype=torch.uint8)
        for part in (torch.tensor([len(body)]), body):
            dist.broadcast(part, FIRST, group=self._orders)

    def hear(self) -> Order:
        """Prepare stage of the others.

        Raises:
            EngineLost: the first rank has ended.
        """
        size = torch.zeros(1, dtype=torch.int64)
        try:
            dist.broadcast(size, FIRST, group=self._orders)
            body = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(body, FIRST, group=self._orders)
        except RuntimeError as error:  # of gloo: the connection is closed
            raise EngineLost(f"the first rank has ended: {error}") from None
        return msgspec.msgpack.decode(body.numpy().data, type=Order)

    def common(self, error: Exception | None) -> Exception | None:
        """The same failure on all ranks, of the lowest that has one; None if all went well."""
        if not self.any(error is not None):
            return None
        told: list[tuple[str, str] | None] = [None] * self.size
        dist.all_gather_object(told, _described(error), group=self.host_group)
        rank, (name, message) = next((rank, each) for rank, each in enumerate(told) if each)
        shared = by_name(name, f"{message} (rank {rank})")
        shared.__cause__ = error
        return shared

    def refuse_difference(self, facts: Sequence[int]) -> None:
        """
        Raises:
            RankDivergence: the ranks do not agree on `facts`, as many on each.
        """
        if not facts:
            return
        both = torch.tensor([*facts, *(-fact for fact in facts)], dtype=torch.int64)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.host_group)
        highest, lowest = both.chunk(2)
        if not torch.equal(highest, -lowest):
            raise RankDivergence(f"a command failed on some ranks only: {(-lowest).tolist()} to {highest.tolist()}")

    def any(self, fact: bool) -> bool:
        """Whether it holds on a rank."""
        value = torch.tensor([int(fact)])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host_group)
        return bool(value)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; what it raises is raised by all."""
        value, error = None, None
        if self.is_first:
            try:
                value = make()
            except Exception as raised:  # of any kind: the others must hear of it
                error = raised
        told = [value, _described(error)]
        dist.broadcast_object_list(told, FIRST, group=self.host_group)
        if told[1] is not None:
            raise error or by_name(*told[1])
        return told[0]  # pyright: ignore[reportReturnType]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Compute stage: add up all ranks' tensors, in place."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Compute stage: give all ranks what the first one has."""
        for tensor in tensors:
            dist.broadcast(tensor, FIRST)

    def sum_delivered(self, tensors: Sequence[Tensor]) -> None:
        """Deliver stage: add up all ranks' results, on the host."""
        for tensor in tensors:
            dist.all_reduce(tensor, group=self._deliveries)


Ranks = OneRank | ManyRanks


def join() -> Ranks:
    """The ranks that torchrun, or the client, has started this process among. It sees one GPU from now on, its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ONE_RANK
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    own = int(os.environ["LOCAL_RANK"])
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[own] if visible else str(own)
    return ManyRanks()


def _gloo() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _described(error: Exception | None) -> tuple[str, str] | None:
    """What can be sent of an error; see `by_name`."""
    if error is None or isinstance(error, XorlError):
        return error and (type(error).__name__, str(error))
    return InternalError.__name__, f"{type(error).__name__}: {error}"
