"""An SGLang server without a model: keeps the weights that it really receives, and is as strict as the real one."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
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
        two_phase: True is xorl-sglang's `main`.
        api_key: what it asks for; only /health is free.
        spoil: a weight that it loads wrongly.
    """

    def __init__(
        self,
        *,
        sessions: bool = True,
        two_phase: bool = False,
        die_at: int | None = None,
        stall_at: int | None = None,
        api_key: str | None = None,
        port: int = 0,
        **info: object,
    ) -> None:
        self.sessions, self.two_phase = sessions and not two_phase, two_phase
        self.die_at, self.stall_at = die_at, stall_at
        self.api_key = api_key
        self.spoil: str | None = None
        self.refuse: dict[str, str] = {}  # path -> message
        self.info: dict[str, Any] = {"model_path": "m", "tp_size": 1, "quantization": None, "version": "0.5.23"} | info
        self.weights: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.adapters: dict[str, str] = {}
        self.version = "default"
        self.paused = self.session = self.running = False
        self.groups: dict[str, ProcessGroup] = {}
        self.prepared: Future[dict[str, Tensor]] | None = None
        self.post_processed = 0
        self.num_buckets = 0
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
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

    def answered(self, path: str) -> None:
        """An answer has left."""

    def has(self, path: str) -> bool:
        absent = [] if self.sessions else ["/begin_weight_update", "/end_weight_update"]
        absent += ["/update_weights_from_distributed"] if self.two_phase else ["/prepare_weights_update"]
        return path not in absent and hasattr(self, path.strip("/"))

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> object:
        self.calls.append(path)
        if path in self.refuse:
            raise Refused(self.refuse[path])
        if self.api_key is not None and path != "/health" and key != f"Bearer {self.api_key}":
            raise Refused("Unauthorized", 401)
        if not self.has(path):
            raise Refused("Not Found", 404)
        return getattr(self, path.strip("/"))(**body) or {"success": True, "message": "ok"}

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
        load_format: str | None,
    ) -> None:
        assert not flush_cache
        if self.sessions and not self.session:
            raise Refused("call /begin_weight_update first")
        self._load(self._receive(names, dtypes, shapes, group_name, load_format))

    def prepare_weights_update(
        self,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        load_format: str | None,
        transport: str,
    ) -> None:
        assert transport == "nccl_broadcast"
        if self.prepared is not None:
            raise Refused("an update is in progress; complete it first")
        self.prepared = Future()

        def receive(future: Future[dict[str, Tensor]]) -> None:
            try:
                future.set_result(self._receive(names, dtypes, shapes, group_name, load_format))
            except (Refused, Dead) as error:
                future.set_exception(error)

        threading.Thread(target=receive, args=(self.prepared,)).start()

    def complete_weights_update(
        self,
        group_name: str,
        flush_cache: bool,
        run_post_process_weights: bool,
        transport: str,
        load_format: str | None,
    ) -> None:
        assert self.prepared is not None
        prepared, self.prepared = self.prepared, None
        self._load(prepared.result())
        self.post_processed += run_post_process_weights

    def _receive(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str, load_format: str | None
    ) -> dict[str, Tensor]:
        assert self.paused
        assert load_format in (None, "flattened_bucket")
        if group_name not in self.groups:
            raise Refused(f"group {group_name} does not exist")
        self._maybe_fail()
        kinds = [getattr(torch, dtype) for dtype in dtypes]
        sizes = [prod(shape) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)]
        pieces = [sum(sizes)] if load_format else sizes
        try:
            received = [torch.empty(size, dtype=torch.uint8) for size in pieces]
            for work in [self.groups[group_name].broadcast(piece, 0) for piece in received]:
                work.wait()
        except RuntimeError as error:
            raise Refused(f"Failed to receive: {error}") from None
        flat, offset, tensors = torch.cat(received), 0, dict[str, Tensor]()
        for name, kind, shape, size in zip(names, kinds, shapes, sizes, strict=True):
            assert load_format is None or offset % kind.itemsize == 0, f"{name} at {offset}"
            tensors[name] = flat[offset : offset + size].clone().view(kind).view(shape)
            offset += size
        return tensors

    def update_weights_from_disk(self, model_path: str, weight_version: str, flush_cache: bool) -> None:
        files = sorted(Path(model_path).glob("*.safetensors"))
        if not files:
            raise Refused(f"Failed to get weights iterator: {model_path} has none")
        for file in files:
            self._load(load_file(file))
        self.version, self.info["model_path"] = weight_version, model_path

    def weights_checker(self, action: str) -> object:
        """As SGLang on the CPU, by the names that it was sent."""
        assert action == "checksum"
        sums = {name: sha256(tensor.flatten().view(torch.uint8).numpy()) for name, tensor in self.weights.items()}
        checksums = {name: each.hexdigest()[:16] for name, each in sums.items()}
        whole = sha256(json.dumps(sorted(checksums.items())).encode()).hexdigest()
        return {"success": True, "ranks": [{"checksums": checksums}], "per_engine_checksum": whole}

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

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.weights |= tensors
        if self.spoil in tensors:
            self.weights[self.spoil] = tensors[self.spoil] + 1

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
                answer = fake.answer(self.path, body, self.headers.get("Authorization"))
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
            self.wfile.flush()
            fake.answered(self.path)

        do_GET = do_POST

        def do_OPTIONS(self) -> None:
            self.send_response(405 if fake.has(self.path) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
