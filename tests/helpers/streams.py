"""A GPU's streams on a CPU: notes what is asked for, in which order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor


@dataclass
class FakeEvent:
    """A moment of FakeStreams."""

    streams: "FakeStreams"
    milliseconds: float
    copies: int

    def synchronize(self) -> None:
        self.streams.calls.append("wait")
        self.streams.catch_up(self.copies)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.milliseconds - self.milliseconds


@dataclass
class FakeStreams:
    """DeviceStreams of a device that is a CPU.

    registers: whether memory can be page-locked where it lies. lags: a copy is made when somebody waits for it and not
    before, so that memory which is written to too early shows. milliseconds: the device's clock.
    """

    registers: bool = True
    lags: bool = False
    milliseconds: float = 0.0
    calls: list[str] = field(default_factory=list)
    _copies: list[Callable[[], object]] = field(default_factory=list)
    _made: int = 0

    def pin(self, source: Tensor) -> Tensor:
        self.calls.append("pin")
        return source.clone()

    def register(self, memory: Tensor) -> bool:
        self.calls.append("register")
        return self.registers

    def unregister(self, memory: Tensor) -> None:
        self.calls.append("unregister")

    def copy(self, sources: Sequence[Tensor]) -> list[Tensor]:
        self.calls.append("copy")
        found = [torch.empty_like(one) for one in sources]
        self._copies += [partial(mine.copy_, one) for mine, one in zip(found, sources, strict=True)]
        if not self.lags:
            self.catch_up(len(self._copies))
        return found

    def catch_up(self, copies: int) -> None:
        for copy in self._copies[self._made : copies]:
            copy()
        self._made = max(self._made, copies)

    def event(self) -> FakeEvent:
        self.calls.append("event")
        return FakeEvent(self, self.milliseconds, len(self._copies))
