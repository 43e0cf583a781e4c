"""Where a person follows a run: the progress line, and other people's viewers.

The progress is one moving line in a terminal, a plain line now and then anywhere else. TensorBoard is written where it
is installed (RUN/tensorboard), wandb and mlflow when asked for by ``--log``; their servers, projects and credentials
come from their own environment variables. A step costs about 0.2 ms with TensorBoard. Nothing is read back from any of
them: what counts is in the run folder, and a resumed run goes on there.
"""

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from operator import methodcaller
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Column

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.words import counted

if TYPE_CHECKING:
    from jigsaw_pretrain.train.engine.metrics import Row

NAMES = ("tensorboard", "wandb", "mlflow")

Pixels = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)

PLAIN_EVERY = 10.0
"""Seconds between plain lines, so that a log of a long run stays readable."""


class Logger(Protocol):
    """Takes rows of metrics and pictures (uint8 [height, width, 3]) of a step."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Note a step's numbers."""
        ...

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """Note a picture."""
        ...

    def close(self) -> None:
        """Write what is held back and leave."""
        ...


class _TensorBoard:
    def __init__(self, run: Path, first_step: int, recipe: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote after its last checkpoint is hidden by the viewer from here on.
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: Path, first_step: int, recipe: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(dir=str(run), name=run.name, id=run.absolute().name, resume="allow", config=recipe)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: Path, first_step: int, recipe: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=run.name)
        mlflow.log_params(recipe)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        self._mlflow.log_image(pixels, f"{name}-{step:08d}.png")

    def close(self) -> None:
        self._mlflow.end_run()


_MAKERS: dict[str, Callable[[Path, int, dict[str, Any]], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def known(asked: Sequence[str]) -> tuple[str, ...]:
    """The names of loggers that were asked for; raises UserError for one that there is not."""
    if isinstance(asked, str) or any(name not in (*NAMES, "none") for name in asked):
        raise UserError(f"log must be a list of names ({', '.join(NAMES)}, none), not {asked}")
    return tuple(asked)


def wanted(asked: Sequence[str]) -> tuple[str, ...]:
    """The loggers to use: those asked for (``none`` for none), or TensorBoard where it is installed.

    Raises UserError for one that is not installed, naming the remedy.
    """
    if not known(asked):
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    for name in asked:
        if name != "none" and importlib.util.find_spec(name) is None:
            raise UserError(
                f"--log {name}: {name} is not installed; install it with pip install {name}, or leave --log out"
            )
    return tuple(name for name in dict.fromkeys(asked) if name != "none")


class Loggers:
    """All loggers of a run as one; none at all is fine. Made on rank 0 only."""

    def __init__(self, names: Sequence[str], run: Path, first_step: int, recipe: dict[str, Any]) -> None:
        self._loggers: list[Logger] = [_MAKERS[name](run, first_step, recipe) for name in names]

    def rows(self, rows: Sequence["Row"]) -> None:
        """Note rows of metrics."""
        for row in rows:
            step, values = row["step"], dict(_scalars(row))
            self._each(methodcaller("scalars", step, values))

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """Note a picture, uint8 [height, width, 3]."""
        self._each(methodcaller("picture", step, name, pixels))

    def _each(self, action: Callable[[Logger], object]) -> None:
        """Have every logger do something; one that cannot (a full disk) is left out from then on, which is logged."""
        for logger in tuple(self._loggers):
            try:
                action(logger)
            except OSError as error:
                log.warning("%s ends here: %s", type(logger).__name__.lstrip("_"), error)
                self._loggers.remove(logger)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *_: object) -> None:
        """Close all."""
        self._each(methodcaller("close"))


def _scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by name, those of inner tables as ``table/name``; lists and the step are left out."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value


class ProgressLine:
    """The progress of rank 0; a context manager. Silent on other ranks.

    title: of the bar, which is drawn on a terminal; without one, and elsewhere, lines are logged now and then.
    """

    def __init__(self, done: int, steps: int, visible: bool, title: str | None = None) -> None:
        console = Console()
        self._steps = steps
        self._visible = visible
        self._printed = self._began = time.monotonic()
        self._begun_at = done
        self._rich: Progress | None = None
        if visible and title and console.is_terminal:
            self._rich = Progress(
                # What a narrow terminal cuts off is what matters least.
                TextColumn(
                    "{task.description} step {task.completed:,.0f}/{task.total:,.0f}"
                    "{task.fields[doing]}{task.fields[figures]}",
                    table_column=Column(no_wrap=True, overflow="ellipsis"),
                ),
                console=console,
            )
            self._task = self._rich.add_task(title, total=steps, completed=done, doing="", figures="")

    def __enter__(self) -> "ProgressLine":
        if self._rich:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()

    def show(self, rows: list["Row"]) -> None:
        """Show where the run is after these steps."""
        if not self._visible or not rows:
            return
        done = rows[-1]["step"] + 1
        text = f"{self._ending(done)}  {figures(rows)}"
        if self._rich:
            self._rich.update(self._task, completed=done, figures=text)
        elif done == self._steps or time.monotonic() - self._printed >= PLAIN_EVERY:
            self._printed = time.monotonic()
            log.info("step %d/%d%s", done, self._steps, text)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say on the bar what keeps the run from its next step, for as long as it does."""
        if self._rich is None:
            yield
            return
        self._rich.update(self._task, doing=f", {what}", refresh=True)
        try:
            yield
        finally:
            self._rich.update(self._task, doing="")

    def _ending(self, done: int) -> str:
        """When the schedule will end at the speed so far, checkpoints included: a local clock time, a date if far."""
        if done >= self._steps or done <= self._begun_at:
            return ""
        pace = (time.monotonic() - self._began) / (done - self._begun_at)
        left = timedelta(seconds=round(pace * (self._steps - done)))
        end = datetime.now() + left
        return f", {left} left" if left < timedelta(hours=12) else f", ends {end:%a %d %b %H:%M}"


def figures(rows: Sequence["Row"]) -> str:
    """Loss and accuracy averaged over the rows, the last one's speed, waiting share and rate, and the GPU memory used.

    What is asked for most comes first.
    """
    last = rows[-1]
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    parts = [f"loss {sum(losses) / len(losses):.3f}" if losses else "loss not finite"]
    if "accuracy" in last:
        shares = [share for row in rows for share in row["accuracy"].values()]
        parts.append(f"accuracy {sum(shares) / len(shares):.1%}")
    # The majority's share beside the accuracy, so that 80 columns show both.
    for key, said in (("majority_share", "majority"), ("balanced_accuracy", "balanced")):
        if found := [row[key] for row in rows if key in row]:
            parts.append(f"{said} {sum(found) / len(found):.1%}")
    parts += [f"{last['images_per_second']:.1f} images/s", f"data wait {last['data_wait']:.0%}", f"lr {last['lr']:.3g}"]
    # Imported by whoever has a GPU's memory to tell of; the names of the loggers are had without it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        parts.append(f"GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if skipped := sum(row.get("skipped", False) for row in rows):
        parts.append(f"{counted(skipped, 'step')} skipped")
    if replaced := sum(row.get("replaced", 0) for row in rows):
        parts.append(f"{counted(replaced, 'crop')} replaced")
    if last.get("left_out"):
        parts.append(f"{counted(last['left_out'], 'shard')} left out")
    return "  ".join(parts)
