"""Starts processes that receive, and sends to them outside of any sync: for peers, and for the link alone."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import msgspec
import torch
from torch import Tensor

from bench.receiver import TIMEOUT_S, Announcement, Join, Pace, Raw
from xorl.sync.broadcast import BucketBroadcast, GroupHost, bucket_broadcast
from xorl.sync.forecast import Backend

BACKENDS: dict[str, Backend] = {"cpu": "gloo", "cuda": "nccl"}
ROOT = Path(__file__).parents[1]


class Server:
    """A process that receives."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, trust_env=False)

    def ask(self, path: str, body: object) -> None:
        self._http.post(path, json=body).raise_for_status()

    def close(self) -> None:
        self._http.close()


@contextmanager
def serving(count: int, device: torch.device) -> Iterator[list[Server]]:
    """Receivers; on CUDA NCCL is told that each is a host of its own, since two ranks of one may not share a GPU."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    with ExitStack() as stack:
        servers = []
        for number in range(count):
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(paths),
                "NCCL_HOSTID": f"receiver-{number}",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", "bench.receiver", device.type]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, process)
            assert process.stdout is not None
            server = Server(int(process.stdout.readline()))
            stack.callback(server.close)
            servers.append(server)
        yield servers


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class Wire:
    """A group with servers."""

    NAME = "bench"

    def __init__(self, servers: Sequence[Server], device: torch.device) -> None:
        self.servers = servers
        backend = BACKENDS[device.type]
        self._host = GroupHost("127.0.0.1", 0, TIMEOUT_S)
        self._threads = ThreadPoolExecutor(len(servers))
        size = 1 + len(servers)
        joins = [Join("127.0.0.1", self._host.port, rank, size, self.NAME, backend) for rank in range(1, size)]
        with self.asking("/init_weights_update_group", *joins):
            self.group = self._host.form(size, self.NAME, backend)
        self.broadcast: BucketBroadcast = bucket_broadcast(self.group, device, TIMEOUT_S)

    @contextmanager
    def asking(self, path: str, *bodies: Announcement | Join | Raw | Pace) -> Iterator[None]:
        """Ask all servers, each its own or all the same; they have answered when the block is left."""
        each = bodies if len(bodies) == len(self.servers) else bodies * len(self.servers)
        answers = [
            self._threads.submit(server.ask, path, msgspec.to_builtins(body))
            for server, body in zip(self.servers, each, strict=True)
        ]
        yield
        for answer in answers:
            answer.result()

    def send(self, sizes: Sequence[int], fill: Callable[[int, Tensor], None] | None = None) -> None:
        """Buckets of those sizes to servers that load nothing, filled while the one before is on the wire."""
        with self.asking("/raw", Raw(list(sizes), self.NAME)):
            for number, num_bytes in enumerate(sizes):
                slot = self.broadcast.slot(num_bytes)
                if fill is not None:
                    fill(number, slot)
                self.broadcast.send(slot)
            self.broadcast.finish()

    def pace(self, rate: float | None) -> None:
        with self.asking("/pace", Pace(rate)):
            pass

    def close(self) -> None:
        self._threads.shutdown()
        self._host.close()
