"""What does the control plane add to the engine's time? `python -m bench.control_plane`

The servers of bench.served share one core, the client has another, and they take turns; the engine behind them answers
at once. The floor is an ASGI app that looks at nothing, under the same uvicorn; of a lag, half its round trip; of a
stall, the tick that finds it; of decoding, a copy of the body.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import orjson
from pydantic import TypeAdapter

from bench import served
from bench.harness import Options, Result, compare, options, report
from bench.served import INFO, KINDS
from xorl.server import arrays, datums, schema
from xorl.types import Ppo

FLOOR = "bare ASGI"
CONNECTIONS = 32
START_S = 60.0

STEP = orjson.dumps({"model_id": "default", "adam_params": {"learning_rate": 1e-4, "grad_clip_norm": 5.0}})
SLOW_STEP = STEP.replace(b'"grad_clip_norm":5.0', b'"weight_decay":0.005')
"""An engine that takes 5 ms, so that the long-poll is there before the result."""


class Tensor(msgspec.Struct):
    data: list[float]


class Datum(msgspec.Struct):
    model_input: dict[str, list[int]]
    loss_fn_inputs: dict[str, Tensor]


class Input(msgspec.Struct):
    data: list[Datum]


class Request(msgspec.Struct):
    """A forward_backward for msgspec."""

    forward_backward_input: Input


SIZES = {"10 KB": (1, 256), "100 KB": (2, 1280), "1 MB": (6, 4096), "11 MB": (64, 4096), "20 MB": (116, 4096)}
"""Datums and the tokens of each, four numbers a token."""


class Client:
    """One connection, blocking."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, path: str, body: bytes = b"", method: str = "POST") -> None:
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self._socket.sendall(head.encode() + b"\r\n\r\n" + body)

    def receive(self) -> bytes:
        """The body of the next answer.

        Raises:
            RuntimeError: it is a refusal.
        """
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._socket.recv(2**16)
        head = received[:end].lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        pieces = [received[end + 4 :]]
        while (missing := length - sum(map(len, pieces))) > 0:
            pieces.append(self._socket.recv(min(missing, 2**20)))
        body = b"".join(pieces)
        if head.split()[1] != b"200":
            raise RuntimeError(body.decode())
        return body

    def post(self, path: str, body: bytes) -> bytes:
        self.send(path, body)
        return self.receive()

    def retrieve(self, ref: bytes) -> bytes:
        return self.post("/api/v1/retrieve_future", ref)

    def stall_s(self) -> float:
        """The longest time in which the server's loop was busy since the last such call."""
        self.send("/stall", method="GET")
        return float(self.receive())

    def wait_for_server(self) -> None:
        """Raises: RuntimeError: it is not ready within START_S."""
        give_up_at = time.monotonic() + START_S
        while True:
            try:
                self.post("/api/v1/optim_step", STEP)
                return
            except RuntimeError:
                if time.monotonic() > give_up_at:
                    raise
            time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__ or "", arguments)
    sizes = ["10 KB"] if chosen.small else SIZES
    bodies = {name: forward_backward(*SIZES[name]) for name in sizes}
    results: list[Result] = []
    with served.served() as ports:
        for port in ports.values():
            Client(port).wait_for_server()
        results += futures(ports, chosen)
        results += latencies(ports, chosen)
        for name, body in bodies.items():
            results += submits(name, ports, body, chosen)
        results += lags(ports, chosen)
    for name, body in bodies.items():
        results += decoders(name, body, chosen)
    report("control plane", results, chosen)


def forward_backward(num_datums: int, num_tokens: int) -> bytes:
    """A body as xorl-client sends it: ids, and float32 values in all the digits that Python prints of them."""
    rng = np.random.default_rng(0)

    def tensor(values: np.ndarray, dtype: str) -> dict[str, object]:
        return {"data": values.tolist(), "dtype": dtype, "shape": [num_tokens]}

    data = [
        {
            "model_input": {"input_ids": rng.integers(0, INFO.vocab_size, num_tokens).tolist()},
            "loss_fn_inputs": {
                "target_tokens": tensor(rng.integers(0, INFO.vocab_size, num_tokens), "int64"),
                "logprobs": tensor(-rng.exponential(2.0, num_tokens).astype(np.float32), "float32"),
                "advantages": tensor(rng.normal(size=num_tokens).round(5), "float32"),
            },
        }
        for _ in range(num_datums)
    ]
    return orjson.dumps({"model_id": "default", "forward_backward_input": {"loss_fn": "ppo", "data": data}})


def futures(ports: Mapping[str, int], chosen: Options) -> list[Result]:
    """The time of a future, submitted and retrieved, when many are on their way at once: the inverse of the rate."""

    def cycle(clients: Sequence[Client]) -> Callable[[], None]:
        def run() -> None:
            for client in clients:
                client.send("/api/v1/optim_step", STEP)
            for client in clients:
                client.send("/api/v1/retrieve_future", client.receive())
            for client in clients:
                client.receive()

        return run

    runs: dict[str, Callable[[], None]] = {
        kind: cycle([Client(port) for _ in range(CONNECTIONS)]) for kind, port in ports.items()
    }
    more = replace(chosen, rounds=chosen.rounds * 10)
    results = compare(f"a future, {CONNECTIONS} at once", runs, dict.fromkeys(runs, 1.0), more)
    each = [replace(r, median_s=r.median_s / CONNECTIONS, spread_s=r.spread_s / CONNECTIONS) for r in results]
    floor_s = next(r.median_s for r in each if r.name == FLOOR)
    return [replace(r, floor_s=floor_s) for r in each]


def latencies(ports: Mapping[str, int], chosen: Options) -> list[Result]:
    """One connection, one request at a time."""
    clients = {kind: Client(port) for kind, port in ports.items()}
    submits_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cycles_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(chosen.rounds * 25):
        for kind, client in clients.items():
            start = time.perf_counter()
            ref = client.post("/api/v1/optim_step", STEP)
            submits_s[kind].append(time.perf_counter() - start)
            client.retrieve(ref)
            cycles_s[kind].append(time.perf_counter() - start)
    return [
        result
        for share in (0.5, 0.99)
        for case, seconds in (("submit", submits_s), ("submit + retrieve", cycles_s))
        for result in quantile(case, seconds, share, float(np.quantile(seconds[FLOOR], share)))
    ]


def submits(size: str, ports: Mapping[str, int], body: bytes, chosen: Options) -> list[Result]:
    """A body sent and accepted, and the longest time for which the server's loop was busy meanwhile."""
    clients = {kind: Client(port) for kind, port in ports.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    stalls_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(chosen.rounds):
        for kind, client in clients.items():
            client.stall_s()
            start = time.perf_counter()
            ref = client.post("/api/v1/forward_backward", body)
            seconds[kind].append(time.perf_counter() - start)
            stalls_s[kind].append(client.stall_s())
            client.retrieve(ref)
    return [
        *quantile(f"forward_backward, {size}", seconds, 0.5, float(np.median(seconds[FLOOR]))),
        *quantile(f"loop stall, {size}", stalls_s, 0.5, served.TICK_S),
    ]


def lags(ports: Mapping[str, int], chosen: Options) -> list[Result]:
    """From the engine's answer to that of the long-poll that waits for it; both read the machine's one clock."""
    clients = {kind: Client(port) for kind, port in ports.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(chosen.rounds * 5):
        for kind, client in clients.items():
            start = time.perf_counter()
            ref = client.post("/api/v1/optim_step", SLOW_STEP)
            if kind == FLOOR:
                seconds[kind].append((time.perf_counter() - start) / 2)
                continue
            result = orjson.loads(client.retrieve(ref))
            seconds[kind].append(time.perf_counter() - result["metrics"]["grad_norm"])
    floor_s = float(np.median(seconds.pop(FLOOR)))
    return [result for share in (0.5, 0.99) for result in quantile("lag of a result", seconds, share, floor_s)]


def quantile(case: str, seconds: Mapping[str, Sequence[float]], share: float, floor_s: float) -> list[Result]:
    """The quantile in place of the median; the spread stays that between the quartiles."""
    results: list[Result] = []
    for kind, times in seconds.items():
        low, value, high = (float(part) for part in np.quantile(times, (0.25, share, 0.75)))
        results.append(Result(f"{case}, p{share * 100:.0f}", kind, value, high - low, floor_s, None))
    return results


def decoders(size: str, body: bytes, chosen: Options) -> list[Result]:
    """From bytes to values, each in its own way; `xorl` has arrays then, checked and laid into columns."""
    lists = msgspec.json.Decoder(Request)
    pydantic_lists = TypeAdapter(served.ForwardBackwardRequest)

    def columns(load: Callable[[bytes], Any]) -> datums.Columns:
        given = schema.ForwardBackwardRequest.model_validate(load(body)).forward_backward_input
        return datums.columns(datums.from_json(given.data, Ppo()), Ppo(), INFO)

    assert columns(arrays.loads) == columns(orjson.loads)
    runs = {
        "xorl, to columns": lambda: columns(arrays.loads),
        "xorl, to arrays": lambda: arrays.loads(body),
        "json": lambda: json.loads(body),
        "orjson": lambda: orjson.loads(body),
        "orjson, to columns": lambda: columns(orjson.loads),
        "pydantic": lambda: pydantic_lists.validate_json(body),
        "msgspec": lambda: lists.decode(body),
    }
    copy_s = compare("", {"copy": lambda: bytearray(body)}, {"copy": 1.0}, chosen)[0].median_s
    return compare(f"decode, {size}", runs, dict.fromkeys(runs, copy_s), chosen)


if __name__ == "__main__":
    main()
