"""Batches on their way to a GPU, beside what it computes: page-locked memory, a stream of copies, and events.

What is asked of CUDA is in one small object, CudaStreams, so that a test puts another one in its place and sees on any
machine what is asked for, and in which order. On a CPU there is none: batches are used where they lie.

A batch is copied while the GPU computes the step before, and the host goes on at once. It waits at one place, without
being busy: before it asks for a copy, until the copy and the steps before the last one are done. So it is never more
than a step ahead, and the loader may write into memory that it lent two batches ago.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A moment in what a GPU computes (torch.cuda.Event)."""

    def synchronize(self) -> None:
        """Wait for it, asleep."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to a later one; both have come."""
        ...


class DeviceStreams(Protocol):
    """What a GPU is asked for beside computing."""

    def pin(self, source: Tensor) -> Tensor:
        """A copy in page-locked memory, from which copies to the GPU do not wait."""
        ...

    def register(self, memory: Tensor) -> bool:
        """Lock memory's own pages, where that works."""
        ...

    def unregister(self, memory: Tensor) -> None:
        """Wait for the GPU and undo ``register``; before the memory is freed."""
        ...

    def copy(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Begin copies to the GPU beside what it computes; what it is asked to compute from now on waits for them."""
        ...

    def event(self) -> Event:
        """The moment when all that the GPU was asked to compute so far is done."""
        ...


class CudaStreams:
    """DeviceStreams of a CUDA device; its copies have a stream of their own, ``copying``."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.copying = device, torch.cuda.Stream(device)

    def pin(self, source: Tensor) -> Tensor:
        """A copy in page-locked memory."""
        return source.pin_memory()

    def register(self, memory: Tensor) -> bool:
        """cudaHostRegister, for any device; False where the system does not let it."""
        failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 1))
        if failed:
            # The runtime keeps the error for whoever asks next, which is the check after a kernel's launch.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self._device)
        return not failed

    def unregister(self, memory: Tensor) -> None:
        """cudaHostUnregister, after all copies are done."""
        torch.cuda.synchronize(self._device)
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def copy(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Copies on their own stream."""
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self.copying):
            copies = [one.to(self._device, non_blocking=True) for one in sources]
        computing.wait_stream(self.copying)
        for one in copies:
            # Freed there, it may be in use here.
            one.record_stream(computing)
        return copies

    def event(self) -> Event:
        """An event that is waited for asleep, and timed."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class DeviceCopies:
    """Copies a run's batches to its device, one after the other; ``streams``: none where that is a CPU."""

    def __init__(self, device: torch.device, streams: DeviceStreams | None) -> None:
        self._device, self._streams = device, streams
        self._arrived: Event | None = None

    def __call__(self, *sources: Tensor) -> tuple[list[Tensor], Event | None]:
        """The tensors on the device, and the moment when they lie there and the steps before are done."""
        if self._streams is None:
            return [one.to(self._device) for one in sources], None
        if self._arrived is not None:
            # The loader writes into that batch's memory again after the next one.
            self._arrived.synchronize()
        copies = self._streams.copy(sources)
        self._arrived = self._streams.event()
        return copies, self._arrived
