"""SIGTERM and SIGINT as requests: noted when they come, served by the loop between two steps.

A scheduler's SIGTERM and a person's Ctrl-C then cost nothing but the step in flight. torchrun forwards both and waits
30 seconds before it kills, so later ones are only noted again and no harm is done; SIGQUIT ends at once.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context manager that catches the two signals; ``name`` is the one that came, or None."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may install handlers; elsewhere (a notebook's thread) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            self._former = {one: signal.signal(one, self._note) for one in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._former.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
