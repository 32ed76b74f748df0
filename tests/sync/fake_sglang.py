"""An SGLang server without a model: keeps the weights that it really receives, and is as strict as the real one."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from xorl.sync.broadcast import join_group

JOIN_TIMEOUT_S = 30.0


class Refused(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Dead(Exception):
    """The connection ends without an answer."""


class FakeSglang:
    """
    Attributes:
        weights: what it serves.
        calls: the paths of all requests, in order.
        die_at, stall_at: number of the bucket at which it dies or stops to answer.
        sessions: False is a server before 0.5.21.
    """

    def __init__(self, *, sessions: bool = True, die_at: int | None = None, stall_at: int | None = None) -> None:
        self.sessions, self.die_at, self.stall_at = sessions, die_at, stall_at
        self.refuse: dict[str, str] = {}  # path -> message
        self.info: dict[str, Any] = {"model_path": "m", "tp_size": 1, "quantization": None, "version": "0.5.23"}
        self.weights: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.adapters: dict[str, str] = {}
        self.version = "default"
        self.paused = self.session = self.running = False
        self.groups: dict[str, ProcessGroup] = {}
        self.num_buckets = 0
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @contextmanager
    def serving(self) -> Iterator["FakeSglang"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> object:
        self.calls.append(path)
        if path in self.refuse:
            raise Refused(self.refuse[path])
        method = getattr(self, path.strip("/").replace("/", "_"), None)
        if method is None or (not self.sessions and path in ("/begin_weight_update", "/end_weight_update")):
            raise Refused("Not Found", 404)
        return method(**body) or {"success": True, "message": "ok"}

    def health(self) -> None:
        if self.paused:
            raise Refused("", 503)

    def model_info(self) -> object:
        return {"weight_version": self.version}

    def server_info(self) -> object:
        return self.info | {"internal_states": [{}]}

    def pause_generation(self, mode: str) -> None:
        self.paused = True

    def continue_generation(self) -> None:
        self.paused = False

    def init_weights_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        if group_name in self.groups:
            raise Refused(f"Group {group_name} already exists")
        try:
            self.groups[group_name] = join_group(
                master_address, master_port, rank_offset, world_size, group_name, backend, JOIN_TIMEOUT_S
            )
        except RuntimeError as error:
            raise Refused(str(error)) from None

    def destroy_weights_update_group(self, group_name: str) -> None:
        if self.groups.pop(group_name, None) is None:
            raise Refused("no such group")

    def begin_weight_update(self) -> None:
        if self.session:
            raise Refused("a session is open")
        self.session = True

    def end_weight_update(self) -> None:
        if not self.session:
            raise Refused("no session is open")
        self.session = False

    def update_weights_from_distributed(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        flush_cache: bool,
        load_format: str,
    ) -> None:
        assert self.paused
        assert not flush_cache
        assert load_format == "flattened_bucket"
        if self.sessions and not self.session:
            raise Refused("call /begin_weight_update first")
        if group_name not in self.groups:
            raise Refused(f"group {group_name} does not exist")
        self._maybe_fail()
        kinds = [getattr(torch, dtype) for dtype in dtypes]
        sizes = [prod(shape) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        try:
            self.groups[group_name].broadcast(flat, 0).wait()
        except RuntimeError as error:
            raise Refused(f"Failed to receive: {error}") from None
        offset = 0
        for name, kind, shape, size in zip(names, kinds, shapes, sizes, strict=True):
            assert offset % kind.itemsize == 0, f"{name} at {offset}"
            self.weights[name] = flat[offset : offset + size].view(kind).view(shape).clone()
            offset += size

    def update_weight_version(self, new_version: str, abort_all_requests: bool) -> None:
        assert not abort_all_requests
        self.version = new_version

    def flush_cache(self) -> None:
        if self.running:
            raise Refused("requests are running")

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool) -> None:
        if lora_name in self.adapters:
            raise Refused("already loaded")
        self.adapters[lora_name] = lora_path

    def unload_lora_adapter(self, lora_name: str) -> None:
        if self.adapters.pop(lora_name, None) is None:
            raise Refused("not loaded")

    def _maybe_fail(self) -> None:
        bucket_idx = self.num_buckets
        self.num_buckets += 1
        if bucket_idx == self.stall_at:
            self.released.wait()
            raise Dead
        if bucket_idx == self.die_at:
            self.groups.clear()
            raise Dead


def _handler(fake: FakeSglang) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else {}
            status = 200
            try:
                answer = fake.answer(self.path, body)
            except Refused as error:
                status, answer = error.status, {"success": False, "message": str(error)}
            except Dead:
                self.close_connection = True
                return
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
