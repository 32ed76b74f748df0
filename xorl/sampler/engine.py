"""Steps through generation on a thread of its own, the only one that touches the model."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from xorl.errors import EngineLost, InternalError, InvalidRequest
from xorl.sampler.adapters import LoadedAdapter
from xorl.sampler.batch import Batch
from xorl.sampler.network import Network
from xorl.sampler.rows import Abort, Row, certain_future, finish_reason
from xorl.sampler.text import Text
from xorl.types import PauseMode

MAX_RUNNING_ROWS = 256
MAX_PREFILL_TOKENS = 8192

T = TypeVar("T")


class Engine:
    """Runs rows together in one batch that rows join and leave between steps.

    `submit`, `call`, `call_alone` and `stop` may be called from any thread; all else runs on the engine's own,
    as an action between two steps.
    """

    def __init__(self, network: Network, text: Text, weight_version: str = "default") -> None:
        self.network = network
        self.text = text
        self.adapters: dict[str, LoadedAdapter] = {}
        self.weight_version = weight_version
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Row] = deque()
        self._running = Batch(network)
        self._paused = False
        self._alone: deque[Callable[[], None]] = deque()
        self._behind: deque[Row] = deque()  # rows that came after the first of `_alone`
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="sampler-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows; the future of each has it when it is finished."""
        self._post(lambda: (self._behind if self._alone else self._waiting).extend(rows))

    def call(self, action: Callable[[], T]) -> "Future[T]":
        """Run `action` between two steps."""
        future: Future[T] = certain_future()
        self._post(lambda: _resolve(future, action))
        return future

    def call_alone(self, action: Callable[[], T], *, abort: bool = False) -> "Future[T]":
        """Run `action` when generation is paused or all rows that came before are finished; new rows wait behind it."""
        future: Future[T] = certain_future()

        def enqueue() -> None:
            if abort:
                self.abort("")
            self._alone.append(lambda: _resolve(future, action))

        self._post(enqueue)
        return future

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after its present step; unfinished rows end as aborted."""

        def halt() -> None:
            self._stopped = True

        self._inbox.put(halt)
        self._thread.join(timeout_s)

    # Actions, for `call` and `call_alone`

    def pause(self, mode: PauseMode) -> None:
        """Stop stepping. Rows end (abort), are to be computed anew (retract), or stay as they are (in_place)."""
        self._paused = True
        if mode == "abort":
            self.abort("")
        elif mode == "retract":
            self._waiting.extendleft(reversed(self._running.take_all()))

    def resume(self) -> None:
        self._paused = False

    def abort(self, prefix: str) -> None:
        """End every row whose request_id starts with `prefix`, as SGLang matches them."""
        rows = (*self._running.rows, *self._waiting, *self._behind)
        self.abort_rows([row for row in rows if row.prompt.request_id.startswith(prefix)])

    def abort_rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.finish is None:
                row.end(Abort(), self.weight_version)
        self._running.drop_finished()
        for queued in (self._waiting, self._behind):
            unfinished = [row for row in queued if row.finish is None]
            queued.clear()
            queued.extend(unfinished)

    def flush(self) -> bool:
        """Whether no keys and values of older weights are left; there is no cache beyond the running rows."""
        return not self._running.rows

    def set_weight_version(self, version: str, *, abort: bool) -> None:
        if abort:
            self.abort("")
        self.weight_version = version

    def refuse_loaded(self, adapter_name: str) -> None:
        if adapter_name in self.adapters:
            raise InvalidRequest(f"LoRA adapter {adapter_name} is already loaded; unload it first")

    def add_adapter(self, adapter: LoadedAdapter) -> None:
        self.refuse_loaded(adapter.name)
        self.adapters = self.adapters | {adapter.name: adapter}

    def remove_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise InvalidRequest(f"LoRA adapter {name} is not loaded; loaded are {sorted(self.adapters)}")
        self.adapters = {key: value for key, value in self.adapters.items() if key != name}

    # The loop

    def _post(self, message: Callable[[], None]) -> None:
        if self._stopped or not self.alive:
            raise EngineLost("the sampler is shutting down")
        self._inbox.put(message)

    @torch.inference_mode()
    def _loop(self) -> None:
        while not self._stopped:
            self._receive()
            while self._alone and (self._paused or not (self._running.rows or self._waiting)):
                self._alone.popleft()()
            if not self._alone:
                self._waiting.extend(self._behind)
                self._behind.clear()
            if not self._paused:
                try:
                    self._step()
                except Exception as error:  # one broken batch must not take the server's other requests with it
                    for row in self._running.take_all():
                        row.fail(InternalError(f"{type(error).__name__}: {error}"))
        self.abort("")

    def _receive(self) -> None:
        """Take all messages; sleep for one when there is nothing else to do."""
        busy = self._alone or (not self._paused and (self._running.rows or self._waiting))
        try:
            while True:
                self._inbox.get(block=not busy)()
                busy = True
        except queue.Empty:
            pass

    def _step(self) -> None:
        admitted = self._admit()
        if admitted:
            self._running.prefill(admitted, self.weight_version)
        elif self._running.rows:
            self._running.decode(self.weight_version)
        self._retire()

    def _admit(self) -> list[Row]:
        """Rows from the head of the queue, as many as fit beside the running ones into one prefill."""
        admitted: list[Row] = []
        num_tokens, room = 0, MAX_RUNNING_ROWS - len(self._running.rows)
        while self._waiting and len(admitted) < room:
            num_tokens += len(self._waiting[0].tokens)
            if admitted and num_tokens > MAX_PREFILL_TOKENS:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _retire(self) -> None:
        for row in self._running.rows:
            reason = finish_reason(row, self.text) if row.finish is None else None
            if reason is not None:
                row.end(reason, self.weight_version)
        self._running.drop_finished()


def _resolve(future: "Future[T]", action: Callable[[], T]) -> None:
    try:
        future.set_result(action())
    except Exception as error:  # handed to whoever asked
        future.set_exception(error)
