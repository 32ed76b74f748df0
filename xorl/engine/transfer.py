"""Copies between host and device while the device computes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Wait = Callable[[], object]


class Arriving(NamedTuple):
    """Tensors on their way to the host; what they are copied from must live until `wait` returns."""

    tensors: list[Tensor]
    sources: list[Tensor]
    wait: Wait


class Transfer:
    """Two side streams of a CUDA device. On the CPU, where both sides are one, tensors stay what they are.

    No memory is told of the streams that use it: whoever gave a tensor keeps it until its copy, or what was computed
    from the copy, is known to be done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def inward(self, make: Callable[[Callable[[Tensor], Tensor]], T]) -> tuple[T, Wait]:
        """What `make` builds when given a function that copies to the device.

        The second result is to be called before the copies are used: it makes the device wait, not the host.
        """
        if not self._on_cuda:
            return make(lambda x: x), lambda: None
        with torch.cuda.stream(self._inward):
            made = make(lambda x: x.pin_memory().to(self._device, non_blocking=True))
            done = self._inward.record_event()
        return made, lambda: torch.cuda.current_stream(self._device).wait_event(done)

    def outward(self, tensors: Sequence[Tensor]) -> Arriving:
        """Start to copy what the device has been told to compute."""
        sources = list(tensors)
        if not self._on_cuda:
            return Arriving(sources, sources, lambda: None)
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in sources]
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source, non_blocking=True)
            done = self._outward.record_event()
        return Arriving(copies, sources, done.synchronize)
