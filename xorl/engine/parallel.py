"""Knows the engine's other ranks: what all of them do together, and what each holds a part of.

Every rank runs the same steps in the same order, each on its share of the datums. A failure that all ranks share is a
failed request; one that only some have leaves them out of step, which ends the engine.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Literal, TypeVar

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from xorl.engine.commands import AnyCommand
from xorl.errors import EngineLost, by_name

FIRST = 0
"""The rank that hears the control plane and answers it."""

PATIENCE = timedelta(hours=1)
"""How long a rank waits for the others: longer than the first one is busy alone, as with a weight sync."""

SHARE = 0.7
"""Of the free memory, what weights, gradients and moments may take on a device that holds all of them."""

T = TypeVar("T")
R = TypeVar("R")


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

    def worst(self, value: int) -> int:
        return value

    def from_first(self, make: Callable[[], T]) -> T:
        return make()

    def led(self, work: Callable[[Sequence[Callable[[], T]]], R], parts: Sequence[Callable[[], T]]) -> R:
        return work(parts)

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
        self._send(msgspec.msgpack.encode(order))

    def hear(self) -> Order:
        """
        Raises:
            EngineLost: the first rank has ended.
        """
        try:
            return msgspec.msgpack.decode(self._receive(), type=Order)
        except RuntimeError as error:  # of gloo: the connection is closed
            raise EngineLost(f"the first rank has ended: {error}") from None

    def _send(self, body: bytes) -> None:
        for part in (np.array([len(body)]), np.frombuffer(bytearray(body), np.uint8)):
            dist.broadcast(torch.from_numpy(part), FIRST, group=self._orders)

    def _receive(self) -> bytes:
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, FIRST, group=self._orders)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(body, FIRST, group=self._orders)
        return body.numpy().tobytes()

    def common(self, error: Exception | None) -> Exception | None:
        """The same failure on all ranks, of the lowest that has one; None if all went well."""
        if not self.worst(int(error is not None)):
            return None
        told: list[tuple[str, str] | None] = [None] * self.size
        mine = error and (type(error).__name__, str(error))
        dist.all_gather_object(told, mine, group=self.host_group)
        rank, (name, message) = next((rank, each) for rank, each in enumerate(told) if each)
        shared = by_name(name, f"{message} (rank {rank})")
        shared.__cause__ = error
        return shared

    def refuse_difference(self, facts: Sequence[int]) -> None:
        """
        Raises:
            RankDivergence: the ranks do not agree on `facts`.
        """
        if not facts:
            return
        both = torch.tensor([*facts, *(-fact for fact in facts)], dtype=torch.int64)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.host_group)
        highest, lowest = both.chunk(2)
        if not torch.equal(highest, -lowest):
            raise RankDivergence(f"a command failed on some ranks only: {(-lowest).tolist()} to {highest.tolist()}")

    def worst(self, value: int) -> int:
        """The largest of all ranks'."""
        values = torch.tensor([value])
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.host_group)
        return int(values)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; what it raises is raised by all."""
        value, error = None, None
        if self.is_first:
            try:
                value = make()
            except Exception as raised:  # of any kind: the others must hear of it
                error = raised
        told = [value, error and (type(error).__name__, str(error))]
        dist.broadcast_object_list(told, FIRST, group=self.host_group)
        if told[1] is not None:
            raise error or by_name(*told[1])
        return told[0]  # pyright: ignore[reportReturnType]

    def led(self, work: Callable[[Sequence[Callable[[], T]]], R], parts: Sequence[Callable[[], T]]) -> R:
        """Do `work` on the first rank; the others take part in each of `parts`, all collective, when it calls one."""

        def called(number: int) -> T:
            self.from_first(lambda: number)
            return parts[number]()

        def done() -> R:
            try:
                return work([lambda number=number: called(number) for number in range(len(parts))])
            finally:
                self.from_first(lambda: None)

        while not self.is_first and (number := self.from_first(lambda: None)) is not None:
            parts[number]()
        return self.from_first(done)

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
    """The ranks that torchrun, or the client, has started this process among."""
    return ManyRanks() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ONE_RANK


def _gloo() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def is_to_be_sharded(
    mode: Literal["auto", "always", "never"], network: nn.Module, ranks: Ranks, device: torch.device
) -> bool:
    """Whether each rank keeps a part of the layers only; on all ranks the same. `network` is not on `device` yet."""
    if ranks.size == 1 or mode == "never":
        return False
    if mode == "always":
        return True
    return bool(
        ranks.worst(device.type == "cuda" and _needed_bytes(network) > SHARE * torch.cuda.mem_get_info(device)[0])
    )


def _needed_bytes(network: nn.Module) -> int:
    """Trained weights have a gradient, the one of a request and two moments beside them."""
    return sum((5 if p.requires_grad else 1) * p.numel() * p.element_size() for p in network.parameters())


def shard(network: PreTrainedModel, dtype: torch.dtype, ranks: Ranks, device: torch.device) -> None:
    """Leave each rank its part of every layer, and put that on `device`; layers are whole only while they compute.

    Embedding, final norm and head stay whole on every rank. Gradients of the layers are summed over the ranks in each
    backward; those of the rest are not.
    """
    body = network.base_model
    layers = body.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    mesh = init_device_mesh(device.type, (ranks.size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    whole = set(body.parameters()) - set(layers.parameters())
    fully_shard(body, mesh=mesh, reshard_after_forward=True, mp_policy=precision, ignored_params=whole)
    for module in body.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    nn.Module.to(network, device)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All ranks' parts together, for which all must ask; a tensor that is not sharded as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def parted_like(part: Tensor, model: Tensor) -> Tensor:
    """A tensor of which `part` is this rank's, sharded as `model` is."""
    if not isinstance(model, DTensor):
        return part
    return DTensor.from_local(
        part, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )
