"""The training loop of every task: a batch, a step, a row of metrics, and every so often a checkpoint.

A step is a function of the task's state, its batch and (seed, step, rank), so a run that stops and resumes anywhere
equals one that does not, bit for bit on a CPU. The loop takes any task (pre-training, a detector), alone or on many
ranks. Beside a step's own cost it adds a row of sums on the device and, with several ranks, one agreement in host
memory; the host waits for the device once per `log_every` steps only.

Checkpoints, their upload and pages do not stop it: a snapshot of the state is taken in host memory, and a thread writes
it while training goes on, one at a time. A kill at any moment leaves the last complete checkpoint; a signal, an error
and the end wait for the write under way. An evaluation needs the device and does stop it.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.data.device import Event
from jigsaw_pretrain.train.engine.callbacks import Callback, Pictures
from jigsaw_pretrain.train.engine.checkpoint import (
    BackgroundWriter,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    snapshot,
)
from jigsaw_pretrain.train.engine.distributed import Ranks, StopRequest
from jigsaw_pretrain.train.engine.loggers import Loggers, ProgressLine
from jigsaw_pretrain.train.engine.metrics import (
    MetricsWindow,
    Row,
    StepMetrics,
    WindowMetrics,
    metrics_file,
    read_rows,
)
from jigsaw_pretrain.train.engine.run_folder import RunFolder, versions

B = TypeVar("B")

Stopped = Callable[[], bool]
"""Whether a signal has come."""

_GO, _FAILED, _STOP, _UNWRITTEN = 0, 1, 2, 3

log = logging.getLogger(__name__)


class TrainingTask(Protocol[B]):
    """What is trained: a model, its optimizer and its data.

    step: optimizer steps done, so the next batch's number. steps: of the schedule. remedy: what to try where the loss
    is not finite. All methods are called on every rank.
    """

    step: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        ...

    @property
    def remedy(self) -> str:
        """What to do where the loss is not finite."""
        ...

    def open(self, until: int) -> Iterator[B]:
        """Give this rank's batches from ``step`` up to ``until``; raises UserError for data that cannot be had."""
        ...

    def close(self) -> None:
        """End the workers that ``open`` started; harmless without any."""
        ...

    def take(self, batch: B) -> StepMetrics:
        """One optimizer step; ``step`` is left to the trainer."""
        ...

    def rows(self, window: WindowMetrics) -> list[Row]:
        """The rows of metrics.jsonl that say what happened in a window that has steps."""
        ...

    def check(self) -> None:
        """Raise UserError, on all ranks alike, where going on is of no use; after rows were written."""
        ...

    def to_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values. They are copied before the next step."""
        ...

    def check_checkpoint(self, path: Path, content: dict[str, Any]) -> None:
        """Raise UserError for a checkpoint whose place it cannot take."""
        ...

    def restore(self, content: dict[str, Any]) -> None:
        """Take a checkpoint's place, bit for bit."""
        ...


class PeriodicEvaluation(Protocol):
    """Evaluates a run's model as it goes. Called on all ranks, gives the same figures on each.

    key: under which the figures go into the row of the step just done; None for a row of their own.
    """

    key: str | None

    def due(self, step: int) -> bool:
        """Whether the model is evaluated after ``step`` steps."""
        ...

    def made(self, row: Row) -> bool:
        """Whether a row has the figures of an evaluation."""
        ...

    def __call__(self, stopped: Stopped) -> dict[str, Any] | None:
        """The figures; None where a signal came first. The model may be left in eval mode."""
        ...


@dataclass(frozen=True)
class TrainerOptions:
    """Where and how a task is trained.

    log_every, checkpoint_every: steps. keep: checkpoints that stay. describe: writes what the folder says of the run,
    on rank 0, once a step is done, so that a run that never came so far leaves no trace. settings: for the loggers.
    callbacks: called on rank 0. log: names of loggers. title: of the progress bar on a terminal; None logs lines.
    """

    folder: RunFolder
    ranks: Ranks
    log_every: int
    checkpoint_every: int
    keep: int
    describe: Callable[[], None] = lambda: None
    settings: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callback, ...] = ()
    log: tuple[str, ...] = ()
    evaluation: PeriodicEvaluation | None = None
    title: str | None = None


TaskT = TypeVar("TaskT", bound=TrainingTask[Any])


class Trainer(Generic[TaskT]):
    """Takes a task from its step to another one. Create one per process."""

    def __init__(self, task: TaskT, options: TrainerOptions) -> None:
        self.task, self.options, self.ranks = task, options, options.ranks
        self._window = MetricsWindow(self.ranks)
        self._writer = BackgroundWriter()
        self._snapshot: dict[str, Any] | None = None
        self._saved = task.step
        self._evaluated = -1
        self._described = self._ended = False
        self._last: Row | None = None
        self._loggers: Loggers | None = None
        self._progress: ProgressLine | None = None
        self._callbacks = options.callbacks if self.ranks.first else ()
        self._metrics = metrics_file(options.folder.metrics)

    def resume(self) -> bool:
        """Lock the run's folder and restore the newest checkpoint; False where there is none.

        Raises UserError where another process trains in it, no checkpoint can be read, or it is of another model.
        """
        folder, ranks = self.options.folder, self.ranks

        def find() -> Path | None:
            folder.lock()
            newest = newest_checkpoint(folder.checkpoints, self.task.check_checkpoint)
            return newest and newest[0]

        path = ranks.run_on_rank_zero(find)
        if path is None:
            return False
        # Hosts other than rank 0's have nothing staged yet.
        ranks.run_on_all(lambda: folder.stage(path.name))
        content = ranks.run_on_all(lambda: read_checkpoint(folder.checkpoints / path.name))
        try:
            self.task.restore(content)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is of another model than this run's ({reason}): name its own folder") from error
        self.task.step = self._saved = int(content["step"])
        now = versions()
        changed = [
            f"{name} {old}, now {now.get(name)}"
            for name, old in content.get("versions", {}).items()
            if now.get(name) != old
        ]
        if changed:
            ranks.log_rank_zero(
                f"resuming with other versions ({'; '.join(changed)}): results may differ in their last bits",
                logging.WARNING,
            )
        return True

    def run(self, until: int) -> str | None:
        """Train until ``until`` steps are done; returns the name of the signal that ended it sooner, if one did.

        Leaves a checkpoint of the step it reached. Raises UserError (on all ranks) where the data of any rank fails,
        after saving, and where the loss is not finite or a checkpoint could not be written, without.
        """
        task, options, ranks = self.task, self.options, self.ranks
        self._last = ranks.run_on_rank_zero(self._cut_back)
        if self._last is not None and options.evaluation is not None and options.evaluation.made(self._last):
            self._evaluated = task.step
        with (
            StopRequest("stopping after this step, saving") as stop,
            ProgressLine(task.step, task.steps, ranks.first, options.title) as self._progress,
            Loggers(
                options.log if ranks.first else (), options.folder.path, task.step, dict(options.settings)
            ) as self._loggers,
        ):
            try:
                # What a signal kept the run from, before it was continued.
                stopped = not self._evaluate(stop)
                if task.step < until and not stopped:
                    batches = ranks.run_on_all(lambda: task.open(until))
                    self._window.restart()
                while task.step < until and not stopped:
                    began = time.perf_counter()
                    batch, error = _next_batch(batches, task.step)
                    waited = time.perf_counter() - began
                    verdict = ranks.all_reduce_max(self._verdict(stop, error))
                    if verdict == _UNWRITTEN:
                        ranks.run_on_rank_zero(self._writer.wait)
                    if verdict != _GO:
                        self._progress.show(self.flush())
                        self.save(last=True)
                        self._end()
                        if verdict == _FAILED:
                            ranks.run_on_all(partial(_raise, error))
                        stopped = True
                        break
                    self.step(batch, waited)
                    self.describe()
                    save = task.step == until or task.step % options.checkpoint_every == 0
                    if save or self._due() or task.step % options.log_every == 0:
                        self._progress.show(self.flush())
                    if save or self._due():
                        # Also before an evaluation: what goes wrong in it costs no step.
                        self.save(last=task.step == until)
                    stopped = not self._evaluate(stop)
                self._end()
            except UserError:
                self._page_of_failure()
                raise
            finally:
                self.close()
        names = [name for name in ranks.all_gather(stop.name) if name]
        return names[0] if names and stopped else None

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Say on the progress line what keeps the run from its next step, in a ``with`` block."""
        return nullcontext() if self._progress is None else self._progress.doing(what)

    def step(self, batch: Any, waited: float) -> None:
        """One optimizer step on this rank's share of the batch."""
        metrics = self.task.take(batch)
        self._window.add(self.task.step, metrics, waited)
        self._picture(self.task.step, metrics.pictures)
        self.task.step += 1

    def flush(self) -> list[Row]:
        """Write the rows since the last flush; refuses a loss that is not finite, and what the task refuses."""
        window = self._window.flush()
        if not window.steps:
            return []
        rows = self.task.rows(window)
        self._last = rows[-1]
        self._write(rows)
        for row in rows:
            if not row.get("skipped") and not math.isfinite(row["loss"]):
                raise UserError(
                    f"{self.options.folder}: the loss of step {row['step']} is {row['loss']} at a learning rate "
                    f"of {row['lr']:.4g}: {self.task.remedy} (the last checkpoint is from before)"
                )
        self.task.check()
        return rows

    def save(self, last: bool = False) -> None:
        """Have a checkpoint of this step written, unless it is there; waits for the one before. Flush first.

        last: training ends here.
        """
        step = self.task.step
        if self._saved == step:
            return
        self._saved = step
        if self.ranks.first:
            with self.doing("checkpointing"):
                self._writer.settle()
                content = {**self.task.to_checkpoint(), "versions": versions()}
                content = self._snapshot = snapshot(content, self._snapshot)
                copied = None if self.ranks.streams is None else self.ranks.streams.event()
            with self.doing("drawing"):
                for callback in self._callbacks:
                    self._picture(step - 1, callback.on_save(step, last))
            self._writer.submit(partial(self._publish, step, content, copied))
        self._window.restart()

    def describe(self) -> None:
        """Have the folder say what the run is, unless it does."""
        if self._described:
            return
        self._described = True

        def write() -> None:
            if not self.options.folder.description.exists():
                self.options.describe()
                self._writer.submit(self.options.folder.push)

        self.ranks.run_on_rank_zero(write)

    def close(self) -> None:
        """End what ``step`` and ``save`` left running, where they are called without ``run``."""
        self.task.close()
        self._writer.close()

    def _publish(self, step: int, content: dict[str, Any], copied: Event | None) -> None:
        """What the writing thread does: it touches nothing that training goes on with."""
        folder = self.options.folder
        if copied is not None:
            copied.synchronize()
        try:
            save_checkpoint(folder.checkpoints, step, content, self.options.keep)
        except OSError as error:
            raise UserError(
                f"{folder}/checkpoints: the checkpoint of step {step} cannot be written ({error.strerror}): "
                "make room, then --resume from the one before"
            ) from error
        for callback in self._callbacks:
            callback.write(step)
        folder.push()

    def _verdict(self, stop: StopRequest, error: Exception | None) -> int:
        """What this rank is for; of all ranks' the largest holds."""
        if self._writer.failed:
            return _UNWRITTEN
        # A signal wins over an error: a scheduler that ends a job ends its data workers too.
        return _STOP if stop.name else _FAILED if error else _GO

    def _due(self) -> bool:
        evaluation, step = self.options.evaluation, self.task.step
        return evaluation is not None and step > 0 and evaluation.due(step) and self._evaluated != step

    def _evaluate(self, stop: StopRequest) -> bool:
        """Evaluate the model where it is due; False where a signal came first, after a checkpoint."""
        evaluation = self.options.evaluation
        if evaluation is None or not self._due():
            return True
        with self.doing("validating"):
            figures = evaluation(lambda: stop.name is not None)
        if figures is None:
            self.save(last=True)
            return False
        self._evaluated = self.task.step
        self._window.restart()
        if evaluation.key is None:
            self._write([{"step": self.task.step - 1, **figures}])
        elif self._last is not None:
            row = {**self._last, evaluation.key: figures}
            if self.ranks.first:
                self._metrics.replace_last(json.dumps(row))
            if self._loggers is not None:
                self._loggers.rows([{"step": row["step"], evaluation.key: figures}])
        return True

    def _cut_back(self) -> Row | None:
        """Make the folder and leave the rows of the steps that are done; the last one of them."""
        try:
            self.options.folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.options.folder} cannot be made ({error.strerror}): name another folder") from error
        self._metrics.cut_back(self.task.step)
        return next(reversed(read_rows(self._metrics.path)), None)

    def _write(self, rows: Sequence[Row]) -> None:
        if self.ranks.first:
            self._metrics.append([json.dumps(row) for row in rows])
        if self._loggers is not None:
            self._loggers.rows(rows)

    def _picture(self, step: int, pictures: Pictures) -> None:
        if self._loggers is not None:
            for name, pixels in pictures.items():
                self._loggers.picture(step, name, pixels)

    def _end(self) -> None:
        """Wait for the last write and have the callbacks finish; all ranks leave together."""

        def end() -> None:
            with self.doing("checkpointing"):
                self._writer.wait()
            with self.doing("drawing"):
                for callback in self._callbacks:
                    callback.on_end(self.task.step)
            self.options.folder.push()

        self._ended = True
        self.ranks.run_on_rank_zero(end)

    def _page_of_failure(self) -> None:
        """What ``_end`` does where the ranks may no longer be together, for a person to see what went wrong."""
        if self._ended:
            return
        try:
            for callback in self._callbacks:
                callback.on_end(self.task.step)
        except Exception as error:
            log.error("the page of the run could not be written: %s", error)


def _next_batch(batches: Iterator[B], step: int) -> tuple[B | None, Exception | None]:
    """The next batch, or why there is none."""
    try:
        return next(batches), None
    except StopIteration:
        return None, RuntimeError(f"the source ended before step {step}")
    except Exception as error:
        return None, error


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
