"""Metrics of a run: one JSON row per step in ``metrics.jsonl``, and line files that can be cut back to a step.

Losses and hits stay on the device and are fetched a window of steps at a time, so the host waits for a GPU once per
`log_every` steps, not once per step; all rows of a window carry its images per second and waiting share. A row is about
200 bytes (64,000 steps: 13 MB). Loggers get the same numbers; nothing here depends on them.

Rows also say what a step cost: seconds of the device, which is what arms of a comparison are held against. On a GPU
they are the wall clock's, since a rank has its GPU to itself. On a CPU they are the seconds of computing that this
process had: other programs on its cores then change how long a run takes, not what it cost.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jigsaw_pretrain.formats.jigsaw import REGIONS
from jigsaw_pretrain.storage import atomic_write
from jigsaw_pretrain.train.engine.distributed import Ranks


class LineFile:
    """A text file of one line per step that a resumed run cuts back to where it continues."""

    def __init__(self, path: Path, step_of: Callable[[str], int]) -> None:
        self.path = path
        self._step_of = step_of

    def cut_back(self, step: int) -> None:
        """Keep whole lines of steps below ``step`` only, by atomic replacement."""
        if not self.path.exists():
            return
        kept = [line for line in _whole_lines(self.path) if self._step_of(line) < step]
        with atomic_write(self.path) as file:
            file.write("".join(kept).encode())

    def append(self, lines: list[str]) -> None:
        """Add lines (without their ends) and hand them to the system."""
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file with their ends; the last line of a killed process may be half a line and is left out."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl as they were written; none where there is no file."""
    return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []


def metrics_file(path: Path) -> LineFile:
    """The line file of metrics.jsonl."""
    return LineFile(path, lambda line: int(json.loads(line)["step"]))


def digest_file(path: Path) -> LineFile:
    """The line file of digest.txt: ``step identity-sha256 pixels-sha256``."""
    return LineFile(path, lambda line: int(line.split()[0]))


@dataclass(frozen=True)
class Row:
    """One step's metrics over all ranks.

    step: the batch's number, from 0, as `digest` prints it. loss: mean over the global batch. accuracy: by region
    (REGIONS), the share of jigsaws whose region's mean logits are largest at its label. lr: learning rate.
    images_per_second: jigsaws of all ranks over the window's time. data_wait: share of time spent waiting for data.
    replaced: crops of the batch that stand in for undecodable ones. left_out: shards that the run goes on without.
    device_seconds: of one rank's device for the step (device_clock). validation: what evaluate.validation found after
    this step, where it was asked for. levels: with a neck, the loss of each of its levels by name, of which ``loss`` is
    the mean.
    """

    step: int
    loss: float
    accuracy: tuple[float, ...]
    lr: float
    images_per_second: float
    data_wait: float
    replaced: int
    left_out: int = 0
    device_seconds: float = 0.0
    validation: dict[str, Any] | None = None
    levels: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The row as metrics.jsonl holds it."""
        values: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "accuracy": dict(zip(REGIONS, self.accuracy, strict=True)),
            "lr": self.lr,
            "images_per_second": round(self.images_per_second, 2),
            "data_wait": round(self.data_wait, 4),
            "replaced": self.replaced,
            "left_out": self.left_out,
            "device_seconds": round(self.device_seconds, 5),
        }
        if self.levels:
            values["loss_by_level"] = self.levels
        if self.validation is not None:
            values["validation"] = self.validation
        return json.dumps(values)


class MetricsWindow:
    """The steps since the last flush: sums on the device, times on the host."""

    def __init__(self, ranks: Ranks, levels: tuple[str, ...] = ()) -> None:
        """levels: names of a neck's levels."""
        self._ranks, self._levels = ranks, levels
        self._steps: list[tuple[int, float]] = []
        self._sums: list[Tensor] = []
        self._host: list[tuple[int, int]] = []
        self._clock = device_clock(ranks.device)
        self.restart()

    def restart(self) -> None:
        """Begin timing anew (after a checkpoint, whose time is not training's)."""
        self._waited, self._since, self._spent = 0.0, time.perf_counter(), self._clock()

    def add(
        self, step: int, lr: float, losses: Tensor, hits: Tensor, images: int, replaced: int, waited: float
    ) -> None:
        """Note a step: losses are this rank's means over its ``images``, a scalar or one per level (their mean is
        the loss); hits [4] its right predictions by region.
        """
        self._steps.append((step, lr))
        losses = losses.detach().double().reshape(-1)
        whole = torch.cat([losses.mean().reshape(1), losses]) if self._levels else losses
        self._sums.append(torch.cat([whole * images, hits.double()]))
        self._host.append((images, replaced))
        self._waited += waited

    def flush(self) -> list[Row]:
        """The rows of the noted steps, summed over all ranks (the same on each); forgets them."""
        if not self._steps:
            return []
        sums = torch.stack(self._sums).cpu()
        elapsed, spent = time.perf_counter() - self._since, self._clock() - self._spent
        host = torch.tensor(self._host, dtype=torch.float64)
        shared = torch.tensor([self._waited, elapsed, spent], dtype=torch.float64)
        everything = self._ranks.all_reduce_sum(torch.cat([sums.flatten(), host.flatten(), shared]))
        steps, (waited, elapsed, spent) = len(self._steps), everything[-3:].tolist()
        columns = sums.shape[1]
        table = everything[: columns * steps].view(steps, columns)
        counts = everything[columns * steps : -3].view(steps, 2)
        speed = counts[:, 0].sum().item() / max(elapsed / self._ranks.world, 1e-9)
        rows = [
            Row(
                step=step,
                loss=line[0].item() / count.item(),
                accuracy=tuple((line[-4:] / count).tolist()),
                lr=lr,
                images_per_second=speed,
                data_wait=waited / max(elapsed, 1e-9),
                replaced=int(replaced.item()),
                device_seconds=spent / self._ranks.world / steps,
                levels=dict(zip(self._levels, (line[1:-4] / count).tolist(), strict=True)),
            )
            for (step, lr), line, (count, replaced) in zip(self._steps, table, counts, strict=True)
        ]
        self._steps, self._sums, self._host = [], [], []
        self.restart()
        return rows


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock whose differences are device-seconds."""
    return time.process_time if device.type == "cpu" else time.perf_counter
