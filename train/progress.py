"""What a person sees of a run: one moving line in a terminal, a plain line now and then anywhere else."""

import time
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.metrics import Row

PLAIN_EVERY = 10.0
"""Seconds between plain lines, so that a log of a long run stays readable."""


class ProgressLine:
    """The progress of rank 0; a context manager. Silent on other ranks."""

    def __init__(self, done: int, steps: int, visible: bool) -> None:
        console = Console()
        self._steps = steps
        self._visible = visible
        self._printed = time.monotonic()
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
        text = figures(rows)
        if self._rich:
            self._rich.update(self._task, completed=done, figures=text)
        elif done == self._steps or time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            click.echo(f"step {done}/{self._steps}  {text}")


def figures(rows: list[Row]) -> str:
    """Loss and accuracy averaged over the rows, with the last one's rate, speed and waiting share."""
    last = rows[-1]
    loss = sum(row.loss for row in rows) / len(rows)
    accuracy = sum(sum(row.accuracy) for row in rows) / (len(rows) * len(last.accuracy))
    replaced = sum(row.replaced for row in rows)
    trouble = f"  {replaced} crops replaced" if replaced else ""
    trouble += f"  {last.left_out} shards left out" if last.left_out else ""
    return (
        f"loss {loss:.3f}  accuracy {accuracy:.1%}  lr {last.lr:.4g}  "
        f"{last.images_per_second:.1f} images/s  data wait {last.data_wait:.0%}{trouble}"
    )
