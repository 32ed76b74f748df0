"""Takes weights as an SGLang server does, but has no model: `python -m bench.receiver DEVICE`, which prints its port.

It loads a bucket by copying each tensor into memory of its own, and then answers; so do the ways that `bench.sync`
compares, which receive straight into that memory and so are spared the copy.
"""

import sys
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from msgspec.json import decode, encode
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import ProcessGroup

from xorl.sync.broadcast import join_group

TIMEOUT_S = 60.0
COALESCED_BYTES = 25 * 2**20
"""Of torch's buckets: what DistributedDataParallel takes."""

SESSION = ("/begin_weight_update", "/end_weight_update")
INFO = {"version": "0.5.23", "tp_size": 1, "dequantizes": True}


class Join(msgspec.Struct):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str
    backend: str


class Announcement(msgspec.Struct):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str
    load_format: str | None = None


class OnDisk(msgspec.Struct):
    model_path: str


class Raw(msgspec.Struct):
    """Broadcasts of these sizes, to be received and not loaded."""

    sizes: list[int]
    group_name: str


class Pace(msgspec.Struct):
    """Bytes a second to take at most, for a link that is slower than memory; None leaves it to the link."""

    rate: float | None


class Receiver:
    """One rank with the weights that it has been sent."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._groups: dict[str, ProcessGroup] = {}
        self._weights: dict[str, Tensor] = {}
        self._bucket = torch.empty(0, dtype=torch.uint8, device=device)
        self._rate: float | None = None
        self._free_at = 0.0

    def answer(self, path: str, body: bytes) -> object:
        match path:
            case "/server_info":
                return INFO
            case "/init_weights_update_group":
                join = decode(body, type=Join)
                self._groups[join.group_name] = join_group(
                    join.master_address,
                    join.master_port,
                    join.rank_offset,
                    join.world_size,
                    join.group_name,
                    join.backend,
                    TIMEOUT_S,
                )
            case "/update_weights_from_distributed":
                self._receive(decode(body, type=Announcement))
            case "/update_weights_from_disk":
                self._read(Path(decode(body, type=OnDisk).model_path))
            case "/raw":
                raw = decode(body, type=Raw)
                for num_bytes in raw.sizes:
                    self._take(self._groups[raw.group_name], num_bytes)
            case "/pace":
                self._rate = decode(body, type=Pace).rate
            case _:  # pause, sessions, versions, flush: nothing is served here
                pass
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return {"success": True, "message": ""}

    def _receive(self, announced: Announcement) -> None:
        group = self._groups[announced.group_name]
        targets = [self._weight(*of) for of in zip(announced.names, announced.dtypes, announced.shapes, strict=True)]
        match announced.load_format:
            case "flattened_bucket":
                sizes = [target.nbytes for target in targets]
                for target, part in zip(targets, self._take(group, sum(sizes)).split(sizes), strict=True):
                    target.copy_(part.view(target.dtype).view(target.shape))
            case "coalesced":
                dist._broadcast_coalesced(group, targets, COALESCED_BYTES, 0)
            case _:
                for target in targets:
                    group.broadcast(target, 0).wait()

    def _read(self, folder: Path) -> None:
        for name, tensor in load_file(folder / "model.safetensors", device=str(self._device)).items():
            self._weight(name, str(tensor.dtype).removeprefix("torch."), tensor.shape).copy_(tensor)

    def _take(self, group: ProcessGroup, num_bytes: int) -> Tensor:
        if self._bucket.numel() < num_bytes:
            self._bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        bucket = self._bucket[:num_bytes]
        start = time.perf_counter()
        group.broadcast(bucket, 0).wait()
        if self._rate is not None:
            self._free_at = max(start, self._free_at) + num_bytes / self._rate
            time.sleep(max(0.0, self._free_at - time.perf_counter()))
        return bucket

    def _weight(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        kind = getattr(torch, dtype)
        held = self._weights.get(name)
        if held is None or (held.dtype, held.shape) != (kind, torch.Size(shape)):
            held = torch.zeros(prod(shape), dtype=kind, device=self._device).view(list(shape))
            self._weights[name] = held
        return held


def handler(answer: Callable[[str, bytes], object]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            data = encode(answer(self.path, self.rfile.read(length)))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def do_OPTIONS(self) -> None:
            self.send_response(405 if self.path in SESSION else 404)  # as FastAPI answers
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def main(device: str) -> None:
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(Receiver(torch.device(device)).answer))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
