"""What a person sees of a run: one moving line in a terminal, a plain line now and then anywhere else."""

import time
from datetime import datetime, timedelta
from types import TracebackType

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jigsaw_pretrain.train.engine.metrics import Row

PLAIN_EVERY = 10.0
"""Seconds between plain lines, so that a log of a long run stays readable."""


class ProgressLine:
    """The progress of rank 0; a context manager. Silent on other ranks."""

    def __init__(self, done: int, steps: int, visible: bool) -> None:
        console = Console()
        self._steps = steps
        self._visible = visible
        self._printed = self._began = time.monotonic()
        self._begun_at = done
        self._rich: Progress | None = None
        if visible and console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._rich.add_task("pretrain", total=steps, completed=done, figures="")

    def __enter__(self) -> "ProgressLine":
        if self._rich:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()

    def show(self, rows: list[Row]) -> None:
        """Show where the run is after these steps."""
        if not self._visible or not rows:
            return
        done = rows[-1].step + 1
        text = figures(rows) + self._ending(done)
        if self._rich:
            self._rich.update(self._task, completed=done, figures=text)
        elif done == self._steps or time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            click.echo(f"step {done}/{self._steps}  {text}")

    def _ending(self, done: int) -> str:
        """When the schedule will end at the speed so far, checkpoints included: a local clock time, a date if far."""
        if done >= self._steps or done <= self._begun_at:
            return ""
        pace = (time.monotonic() - self._began) / (done - self._begun_at)
        left = timedelta(seconds=round(pace * (self._steps - done)))
        end = datetime.now() + left
        return f"  left {left}  ends {end:%H:%M}" if left < timedelta(hours=12) else f"  ends {end:%a %d %b %H:%M}"


def figures(rows: list[Row]) -> str:
    """Loss and accuracy averaged over the rows, the last one's rate, speed, waiting share, and the GPU memory used."""
    last = rows[-1]
    loss = sum(row.loss for row in rows) / len(rows)
    accuracy = sum(sum(row.accuracy) for row in rows) / (len(rows) * len(last.accuracy))
    memory = f"  GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_initialized() else ""
    replaced = sum(row.replaced for row in rows)
    trouble = f"  {replaced} crops replaced" if replaced else ""
    trouble += f"  {last.left_out} shards left out" if last.left_out else ""
    return (
        f"loss {loss:.3f}  accuracy {accuracy:.1%}  lr {last.lr:.4g}  "
        f"{last.images_per_second:.1f} images/s  data wait {last.data_wait:.0%}{memory}{trouble}"
    )
