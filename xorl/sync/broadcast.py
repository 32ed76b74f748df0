"""Opens update groups and broadcasts flat buckets over them."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import psutil
import torch  # before the extension, which needs its libraries
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore

from xorl.config import is_loopback

try:
    from xorl import _C
except ImportError:  # not built here: slower, and otherwise the same
    _C = None

DEVICES = {"gloo": "cpu", "nccl": "cuda"}
"""The backends of update groups, and the kind of tensor each sends."""


OWN_CONNECTIONS = 2
"""To the store that we host: its own, and our end of the group."""

SETTLING_S = 0.3
"""From a member's connection to its waiting for the others."""


class BucketBroadcast(Protocol):
    """Broadcasts flat uint8 buckets from rank 0, two at a time. After a failure a new group is needed.

    Raises:
        RuntimeError: from every method: somebody did not take a bucket in time, has gone, or `abort` was called. It
            names the bucket, counted from 0 over the group's life, and its bytes.
    """

    def slot(self, num_bytes: int) -> Tensor:
        """The buffer to fill for the next `send`; waits until what was in it has left."""
        ...

    def send(self, bytes: Tensor) -> None:
        """Start the broadcast of a slot, or of any flat uint8 tensor, which is kept alive until it has left."""
        ...

    def finish(self) -> None:
        """Wait until everything sent has left."""
        ...

    def abort(self) -> None:
        """End every wait with an error, now and later; from any thread."""
        ...


def bucket_broadcast(group: ProcessGroup, device: torch.device, timeout_s: float) -> BucketBroadcast:
    kind = ReferenceBroadcast if _C is None else _C.BucketBroadcast
    return kind(group, 0, device, timeout_s)


class ReferenceBroadcast:
    """What `_C.BucketBroadcast` must equal: one broadcast at a time, each waited for."""

    def __init__(self, group: ProcessGroup, root: int, device: torch.device, timeout_s: float) -> None:
        self._group = group
        self._device = device
        self._failure: str | None = None
        self._num_sent = 0
        self._options = dist.BroadcastOptions()
        self._options.rootRank = root
        self._options.timeout = timedelta(seconds=timeout_s)

    def slot(self, num_bytes: int) -> Tensor:
        self.finish()
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def send(self, bytes: Tensor) -> None:
        self.finish()
        try:
            self._group.broadcast([bytes], self._options).wait()
        except RuntimeError as error:
            self._failure = f"bucket {self._num_sent} of {bytes.numel()} bytes: {error}"
            self.finish()
        self._num_sent += 1

    def finish(self) -> None:
        if self._failure:
            raise RuntimeError(f"the broadcast failed: {self._failure}")

    def broadcast(self, tensors: Sequence[Tensor], bucket_bytes: int) -> None:
        """Broadcast a list of tensors whose sizes every rank knows."""
        for tensor in tensors:
            if tensor.numel():
                flat = tensor.detach().contiguous().flatten().view(torch.uint8)
                self.send(flat)
                tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))

    def abort(self) -> None:
        self._failure = self._failure or "it was aborted"
        self._group.abort()


class GroupHost:
    """The sender's side of an update group: listens from the start, and is member 0 once everybody has come.

    Closing it ends the wait of all who have not: they get an error, and their servers stay healthy.
    """

    def __init__(self, address: str, port: int, timeout_s: float) -> None:
        """Listen on `address` alone. Port 0 takes a free one.

        Raises:
            OSError: the address is not this machine's, or the port is taken.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.create_server((address, port), family=family)
        self.address = address
        self.port: int = listening.getsockname()[1]
        self._timeout_s = timeout_s
        with _environment(TORCHELASTIC_USE_AGENT_STORE=None):
            self._store: TCPStore | None = TCPStore(
                address,
                self.port,
                is_master=True,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )

    def form(self, world_size: int, group_name: str, backend: str) -> ProcessGroup:
        """The group, once all members have come.

        Raises:
            RuntimeError: somebody did not, within the timeout or before `close`.
        """
        store = _connect(self.address, self.port, self._timeout_s)  # so that the group does not keep ours open
        return _make_group(store, 0, world_size, group_name, backend, self._timeout_s, self.address)

    def dismiss(self, num_guests: int) -> None:
        """Close as soon as that many members are waiting; one who came later would try for its whole timeout."""
        deadline = time.monotonic() + self._timeout_s
        while self._store is not None and time.monotonic() < deadline:
            if self._num_connections() >= num_guests + OWN_CONNECTIONS:
                time.sleep(SETTLING_S)
                break
            time.sleep(0.02)
        self.close()

    def close(self) -> None:
        self._store = None

    def _num_connections(self) -> int:
        connections = psutil.Process().net_connections("tcp")
        return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr[1] == self.port for each in connections)


def join_group(
    master_address: str, master_port: int, rank: int, world_size: int, group_name: str, backend: str, timeout_s: float
) -> ProcessGroup:
    """Join, as `rank` > 0, the update group that a sender opened. Blocks until all members are there.

    Raises:
        RuntimeError: the sender did not listen, or somebody did not come, within the timeout.
        ValueError: there is no such backend.
    """
    store = _connect(master_address, master_port, timeout_s)
    interface = master_address if is_loopback(master_address) else None
    return _make_group(store, rank, world_size, group_name, backend, timeout_s, interface)


def _connect(address: str, port: int, timeout_s: float) -> TCPStore:
    with _environment(TORCHELASTIC_USE_AGENT_STORE=None):
        return TCPStore(address, port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def _make_group(
    store: Store, rank: int, world_size: int, group_name: str, backend: str, timeout_s: float, interface: str | None
) -> ProcessGroup:
    """A group of its own, unknown to torch's global state, which meets those of torch's new_group.

    Args:
        interface: the address that gloo listens on; None lets it choose.
    """
    if backend not in DEVICES:
        raise ValueError(f"backend {backend} is not one of {', '.join(DEVICES)}")
    device = torch.device(DEVICES[backend])
    # The keys under which the other end, torch's own helper behind init_weights_update_group, looks for its peers.
    store = PrefixStore(f"{device.type}/", PrefixStore(f"{group_name}/", PrefixStore(group_name, store)))
    timeout = timedelta(seconds=timeout_s)
    if backend == "gloo":
        kind, end = ProcessGroup.BackendType.GLOO, _gloo(store, rank, world_size, timeout, interface)
    else:
        kind, end = ProcessGroup.BackendType.NCCL, _nccl(store, rank, world_size, timeout)
    end._set_sequence_number_for_group()
    group = ProcessGroup(store, rank, world_size)
    group._set_default_backend(kind)
    group._register_backend(device, kind, end)
    return group


def _gloo(store: Store, rank: int, world_size: int, timeout: timedelta, interface: str | None) -> dist.ProcessGroupGloo:
    if interface is None:
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stub
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=interface)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _nccl(store: Store, rank: int, world_size: int, timeout: timedelta) -> "dist.ProcessGroupNCCL":
    """Makes its communicator at the first broadcast, as SGLang's end does."""
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as SGLang's trainers do: both ends must agree
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="2"):  # a lost receiver is an error, not the end of this process
        return dist.ProcessGroupNCCL(store, rank, world_size, options)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Variables for torch to read meanwhile; under torchrun it would take our store for the launcher's."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
