"""Keeps the registered inference endpoints, with what is loaded on each."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from xorl.engine.commands import Endpoint as SyncTarget
from xorl.engine.commands import SyncReport
from xorl.quantization import Fp8
from xorl.server.schema_inference import AddEndpointRequest, EndpointRow
from xorl.sync.receiver import ReceiverError, ServerInfo


class Receiver(Protocol):
    """One inference server; every method blocks."""

    def alive(self) -> bool: ...
    def server_info(self) -> ServerInfo: ...
    def load_adapter(self, name: str, directory: str) -> None: ...
    def unload_adapter(self, name: str) -> None: ...
    def update_from_disk(self, directory: str) -> None: ...


class Weights(NamedTuple):
    """Sampler weights on disk; `version` tells a checkpoint from another that had its name."""

    name: str | None  # the adapter's name; None for a whole model
    directory: str
    version: str


@dataclass
class Endpoint:
    asked: AddEndpointRequest
    receiver: Receiver
    server_info: ServerInfo
    healthy: bool = True
    stale: bool = False
    loaded: dict[str | None, Weights] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        host = f"[{self.asked.host}]" if ":" in self.asked.host else self.asked.host
        return f"http://{host}:{self.asked.port}"

    def row(self) -> EndpointRow:
        return EndpointRow(
            host=self.asked.host,
            port=self.asked.port,
            worker_port=self.asked.worker_port or self.asked.port,
            world_size=self.asked.world_size,
            healthy=self.healthy,
            stale=self.stale,
            pool=self.asked.pool,
            receiver_kv_cache_dtype=self.asked.receiver_kv_cache_dtype,
            server_info=msgspec.to_builtins(self.server_info),
        )

    async def load(self, weights: Weights, *, again: bool = False) -> None:
        """Make the weights servable here; nothing to do if they are, unless `again`.

        Raises:
            ReceiverError: the endpoint refused or did not answer.
        """
        async with self.lock:
            if self.loaded.get(weights.name) == weights and not again:
                return
            self.loaded.pop(weights.name, None)
            if weights.name is None:
                await asyncio.to_thread(self.receiver.update_from_disk, weights.directory)
                self.stale = False
            else:
                await asyncio.to_thread(self.receiver.load_adapter, weights.name, weights.directory)
            self.loaded[weights.name] = weights

    async def unload(self, name: str) -> None:
        async with self.lock:
            if self.loaded.pop(name, None):
                await asyncio.to_thread(self.receiver.unload_adapter, name)


class Endpoints:
    """host:port -> Endpoint. Lives as long as the process: a restarted server is told again."""

    def __init__(self, allowed_hosts: str, connect: Callable[[str, int], Receiver]) -> None:
        self._allowed = {host.strip() for host in allowed_hosts.split(",")}
        self._connect = connect
        self._endpoints: dict[tuple[str, int], Endpoint] = {}
        self._turn = 0
        self.quantization: Fp8 | None = None

    def __iter__(self):
        return iter(list(self._endpoints.values()))

    def __len__(self) -> int:
        return len(self._endpoints)

    async def add(self, asked: AddEndpointRequest) -> Endpoint | str:
        """The endpoint, reached and registered, or why it was not."""
        address = (asked.host, asked.port)
        if "*" not in self._allowed and asked.host not in self._allowed:
            return f"host {asked.host} is not allowed; inference_hosts allows {', '.join(sorted(self._allowed))}"
        if asked.worker_port not in (None, asked.port):
            return f"worker_port: {asked.worker_port} is not supported; weights are announced at port {asked.port}"
        if address in self._endpoints:
            return f"{asked.host}:{asked.port} is already registered"
        receiver = self._connect(asked.host, asked.port)
        if not await asyncio.to_thread(receiver.alive):
            return f"{asked.host}:{asked.port} does not answer"
        try:
            info = await asyncio.to_thread(receiver.server_info)
        except ReceiverError as error:
            return str(error)
        return self._endpoints.setdefault(address, Endpoint(asked, receiver, info))

    def remove(self, host: str, port: int) -> bool:
        return self._endpoints.pop((host, port), None) is not None

    async def probe(self) -> None:
        """Ask all endpoints at once whether they are alive."""
        endpoints = list(self)
        alive = await asyncio.gather(*(asyncio.to_thread(endpoint.receiver.alive) for endpoint in endpoints))
        for endpoint, healthy in zip(endpoints, alive, strict=True):
            endpoint.healthy = healthy

    def in_pools(self, pools: Sequence[str] | None) -> list[Endpoint]:
        return [endpoint for endpoint in self if pools is None or endpoint.asked.pool in pools]

    def usable(self) -> list[Endpoint]:
        """Endpoints to sample from, whose turn it is first; after one that failed, those that did not."""
        endpoints = list(self)
        if not endpoints:
            return []
        self._turn = (self._turn + 1) % len(endpoints)
        turned = endpoints[self._turn :] + endpoints[: self._turn]
        return sorted((e for e in turned if not e.stale), key=lambda e: not e.healthy)

    def mark(self, report: SyncReport) -> None:
        """Note who has the weights of a sync; the others hold something that nobody asked for."""
        for line in report.endpoints:
            endpoint = self._endpoints.get((line.host, line.port))
            if endpoint is not None:
                endpoint.stale = not line.success
                endpoint.loaded.pop(None, None)

    def distrust(self, targets: Sequence[Endpoint]) -> None:
        """A sync ended without a report: nobody knows what they hold."""
        for endpoint in targets:
            endpoint.stale = True
            endpoint.loaded.pop(None, None)


def sync_target(endpoint: Endpoint) -> SyncTarget:
    return SyncTarget(host=endpoint.asked.host, port=endpoint.asked.port, world_size=endpoint.asked.world_size)
