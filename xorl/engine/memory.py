"""Measures what batches need of memory, and says how many tokens the next one may have."""

import re
from pathlib import Path

import psutil
import torch

SHARE = 0.8
"""Of the free memory, what a batch may take: the rest is for fragments, and for what the measure misses."""

FEWEST_TOKENS = 256
"""Batches of fewer tokens say nothing of what a token needs."""

GROWTH = 1.05
"""By how much the limit that an out-of-memory left rises with each batch that fits."""


class TokenBudget:
    """How many tokens a batch may have: at most `max_tokens`, and what fits into free memory at the worst rate seen.

    One thread adds what it measures, another reads `tokens`.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._limit = float(max_tokens)  # after an out-of-memory lower
        self._bytes_per_token = 0.0
        self._free_bytes: int | None = None

    @property
    def tokens(self) -> int:
        tokens = self._limit
        if self._free_bytes is not None and self._bytes_per_token:
            tokens = min(tokens, SHARE * self._free_bytes / self._bytes_per_token)
        return max(int(tokens), 1)

    def fitted(self, num_tokens: int, used_bytes: int, free_bytes: int) -> None:
        """A batch took `used_bytes` at its worst; before it, `free_bytes` were free."""
        self._free_bytes = free_bytes
        if num_tokens >= FEWEST_TOKENS:
            self._bytes_per_token = max(self._bytes_per_token, used_bytes / num_tokens)
        self._limit = min(self._limit * GROWTH, self._max_tokens)

    def overflowed(self, num_tokens: int) -> None:
        """A batch did not fit."""
        self._limit = max(num_tokens / 2, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Torch's allocator for the CPU has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class MemoryMeter:
    """Watches the memory of the device that the engine computes on: of CUDA's allocator, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> tuple[int, int]:
        """Forget the peak; returns the bytes in use and the bytes that are free."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            used = torch.cuda.memory_allocated(self._device)
            kept = torch.cuda.memory_reserved(self._device) - used
            return used, torch.cuda.mem_get_info(self._device)[0] + kept
        used = _forget_process_peak()
        return used, psutil.virtual_memory().available

    def peak_bytes(self) -> int:
        """The most bytes in use at one time since `start`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _process_bytes("VmHWM")

    def release(self) -> None:
        """Give back what the allocator keeps, before trying with less."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"


def _forget_process_peak() -> int:
    """Returns the bytes in use. Linux keeps a peak for each process; elsewhere the present size has to do."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text(_FORGET_PEAK)
    return _process_bytes("VmRSS")


def _process_bytes(field: str) -> int:
    if not _STATUS.exists():
        return psutil.Process().memory_info().rss
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
