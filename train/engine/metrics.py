"""Metrics of a run: rows of JSON in ``metrics.jsonl``, and line files that can be cut back to a step.

Figures stay on the device and are fetched a window of steps at a time, so the host waits for a GPU once per `log_every`
steps, not once per step. What the rows of a window say is the task's. A row is about 200 bytes (64,000 steps: 13 MB).
Loggers get the same numbers; nothing here depends on them.

Rows also say what a step cost: seconds of the device, which is what arms of a comparison are held against. On a GPU
they are the wall clock's, since a rank has its GPU to itself. On a CPU they are the seconds of computing that this
process had: other programs on its cores then change how long a run takes, not what it cost.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from jigsaw_pretrain.config import CountOrZero, Number, PositiveOrZero, Share
from jigsaw_pretrain.errors import as_named
from jigsaw_pretrain.storage.files import atomic_write
from jigsaw_pretrain.storage.store import MOST_LINES_BYTES, Storage
from jigsaw_pretrain.train.data.device import Event
from jigsaw_pretrain.train.engine.distributed import Ranks

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""A row of metrics.jsonl; its ``step`` is the batch's number, from 0."""


class LineFile:
    """A text file of one line per step that a resumed run cuts back to where it continues."""

    def __init__(self, path: Path, step_of: Callable[[str], int]) -> None:
        self.path = path
        self._step_of = step_of

    def cut_back(self, step: int) -> None:
        """Keep whole lines of steps below ``step`` only, by atomic replacement."""
        if not self.path.exists():
            if self.path.is_symlink():
                # A link that leads nowhere: lines would be written to a new file outside the run.
                self.path.unlink()
            return
        steps = [(line, self._step(line)) for line in _whole_lines(self.path)]
        _tell_damaged(self.path, sum(found is None for _, found in steps))
        kept = [line for line, found in steps if found is not None and found < step]
        with atomic_write(self.path) as file:
            file.write("".join(kept).encode())

    def _step(self, line: str) -> int | None:
        """The step of a line; None for one that is damaged."""
        try:
            return self._step_of(line)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError):
            return None

    def replace_last(self, line: str) -> None:
        """Put ``line`` in place of the last one, by atomic replacement."""
        kept = _whole_lines(self.path)[:-1]
        with atomic_write(self.path) as file:
            file.write("".join([*kept, f"{line}\n"]).encode())

    def append(self, lines: list[str]) -> None:
        """Add lines (without their ends) and hand them to the system."""
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file with their ends; the last line of a killed process may be half a line and is left out."""
    text = Storage(path.parent).read(path.name, MOST_LINES_BYTES).decode(errors="replace")
    return [f"{line}\n" for line in text.split("\n")[:-1]]


def _tell_damaged(path: Path, count: int) -> None:
    if count:
        log.warning("%s: %d damaged lines are left out", as_named(str(path)), count)


class _Known(msgspec.Struct):
    """The numbers of rows that readers compute with; a loss may be infinite or none."""

    step: CountOrZero
    loss: float | None = 0.0
    lr: Number = 0.0
    accuracy: dict[str, Share] = {}
    balanced_accuracy: Share = 0.0
    majority_share: Share = 0.0
    AP: Number = 0.0
    AP50: Number = 0.0
    seconds: PositiveOrZero = 0.0
    seconds_per_step: PositiveOrZero = 0.0
    device_seconds: PositiveOrZero = 0.0
    gpu_memory: Annotated[int, msgspec.Meta(ge=0)] | None = None


def read_rows(path: Path) -> list[Row]:
    """The rows of metrics.jsonl as they were written; none where there is no file.

    A damaged line costs that line; how many there are is logged.
    """
    rows, lines = [], _whole_lines(path) if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            msgspec.convert(row, _Known)
            rows.append(row)
    _tell_damaged(path, len(lines) - len(rows))
    return rows


def metrics_file(path: Path) -> LineFile:
    """The line file of metrics.jsonl."""
    return LineFile(path, lambda line: int(json.loads(line)["step"]))


def digest_file(path: Path) -> LineFile:
    """The line file of digest.txt: ``step identity-sha256 pixels-sha256``."""
    return LineFile(path, lambda line: int(line.split()[0]))


@dataclass(frozen=True)
class StepMetrics:
    """What one rank found at a step.

    sums: of figures over its samples, on the device: each name has a tensor of the same shape at every step. samples:
    how many there are. lr: learning rate. counts: whole numbers, summed over the ranks. pictures: for the loggers,
    uint8 [height, width, 3] by name. arrived: when its batch lay on the GPU and the step before was done, if it is one.
    """

    sums: Mapping[str, Tensor]
    samples: int
    lr: float
    counts: Mapping[str, int] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)
    arrived: Event | None = None


@dataclass(frozen=True)
class StepMeans:
    """A step over all ranks: the means of its figures over the samples, each a list, and the sums of its counts."""

    step: int
    lr: float
    means: Mapping[str, list[float]]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class WindowMetrics:
    """The steps of a window and what they took.

    seconds, device_seconds: of the window, mean over the ranks (device_clock). data_wait: the share of ``seconds`` that
    was spent waiting for data; of a GPU that in which it had nothing to do between two steps, so what the host does
    while it computes is not counted. samples_per_second: of all ranks.
    """

    steps: tuple[StepMeans, ...]
    seconds: float
    device_seconds: float
    data_wait: float
    samples_per_second: float


class MetricsWindow:
    """The steps since the last flush: sums and moments on the device, times on the host."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._steps: list[tuple[int, StepMetrics]] = []
        self._sums: list[Tensor] = []
        self._clock = device_clock(ranks.device)
        self.restart()

    def restart(self) -> None:
        """Begin timing anew (after what is not training: an evaluation)."""
        self._waited, self._since, self._spent = 0.0, time.perf_counter(), self._clock()
        self._idle: list[tuple[Event, Event]] = []
        self._done = None if self._ranks.streams is None else self._ranks.streams.event()

    def add(self, step: int, metrics: StepMetrics, waited: float) -> None:
        """Note a step of which ``waited`` seconds of a CPU were spent waiting for data."""
        self._steps.append((step, metrics))
        self._sums.append(torch.cat([one.detach().double().flatten() for one in metrics.sums.values()]))
        if self._ranks.streams is None:
            self._waited += waited
        elif self._done is not None and metrics.arrived is not None:
            self._idle.append((self._done, metrics.arrived))
            self._done = self._ranks.streams.event()

    def flush(self) -> WindowMetrics:
        """The noted steps over all ranks, the same on each; forgets them."""
        if not self._steps:
            return WindowMetrics((), 0.0, 0.0, 0.0, 0.0)
        # Waits for the device, and so for all moments noted.
        sums = torch.stack(self._sums).cpu()
        self._waited += sum(max(0.0, done.elapsed_time(arrived)) for done, arrived in self._idle) / 1000
        elapsed, spent = time.perf_counter() - self._since, self._clock() - self._spent
        host = torch.tensor([[one.samples, *one.counts.values()] for _, one in self._steps], dtype=torch.float64)
        shared = torch.tensor([self._waited, elapsed, spent], dtype=torch.float64)
        everything = self._ranks.all_reduce_sum(torch.cat([sums.flatten(), host.flatten(), shared]))
        waited, elapsed, spent = everything[-3:].tolist()
        table = everything[: sums.numel()].view_as(sums)
        counts = everything[sums.numel() : -3].view_as(host)
        world, samples = self._ranks.world, counts[:, 0].sum().item()
        steps = tuple(
            StepMeans(step, metrics.lr, _named(metrics.sums, line / line_counts[0]), _counted(metrics, line_counts[1:]))
            for (step, metrics), line, line_counts in zip(self._steps, table, counts, strict=True)
        )
        self._steps, self._sums = [], []
        self.restart()
        wait = waited / max(elapsed, 1e-9)
        return WindowMetrics(steps, elapsed / world, spent / world, wait, samples / max(elapsed / world, 1e-9))


def _named(shapes: Mapping[str, Tensor], line: Tensor) -> dict[str, list[float]]:
    parts = line.split([one.numel() for one in shapes.values()])
    return {name: part.tolist() for name, part in zip(shapes, parts, strict=True)}


def _counted(metrics: StepMetrics, line: Tensor) -> dict[str, int]:
    return {name: int(value) for name, value in zip(metrics.counts, line.tolist(), strict=True)}


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock whose differences are device-seconds."""
    return time.process_time if device.type == "cpu" else time.perf_counter
