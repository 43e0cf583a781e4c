"""Running a comparison's trainings one after the other, in processes of their own, within a budget of seconds.

Every training is a command that resumes, so a comparison that is stopped (by its budget, a signal, a crash) is
continued by calling it again: a training is done when the file that it writes last exists. Trainings never overlap,
since their seconds are part of the result.
"""

import contextlib
import logging
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jigsaw_pretrain.errors import Interrupted, UserError
from jigsaw_pretrain.train.engine.distributed import StopRequest

log = logging.getLogger(__name__)

GRACE = 120.0
"""Seconds that a training has for its checkpoint before it is killed."""

TOLD_EVERY = 60.0
"""Seconds between lines about a training's progress, where there is no terminal."""


class OutOfTime(Exception):
    """The budget is spent: call again to continue."""


@dataclass(frozen=True)
class Task:
    """A training: its command line after ``python -m``, its folder, and the file in it whose presence means done."""

    name: str
    module: str
    arguments: tuple[str, ...]
    folder: Path
    proof: str

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        return (self.folder / self.proof).exists()


class TaskRunner:
    """Runs tasks until ``budget`` seconds are spent (None for no limit), telling which it is of ``total``.

    A training's own progress is shown too: a moving line on a terminal, elsewhere a line now and then.
    """

    def __init__(self, budget: float | None, gpus: int, total: int | None = None) -> None:
        self._until = None if budget is None else time.monotonic() + budget
        self._gpus, self._total = gpus, total
        self._begun: set[Path] = set()
        self._seconds: list[float] = []

    def check(self) -> None:
        """Raise OutOfTime where the budget is spent."""
        if self._until is not None and time.monotonic() >= self._until:
            raise OutOfTime

    def run(self, task: Task) -> None:
        """Run a task to its end unless it is done; raises OutOfTime, Interrupted, or UserError where it fails."""
        self._begun.add(task.folder)
        if task.done:
            return
        self.check()
        task.folder.mkdir(parents=True, exist_ok=True)
        place = f"{len(self._begun)} of {self._total}" if self._total else f"{len(self._begun)}"
        log.info("training %s: %s", place, task.name)
        answer = "stopping, once the training under way has saved"
        with StopRequest(answer) as stop, (task.folder.parent / f"{task.folder.name}.log").open("a") as file:
            # torchrun says at length that it would set this.
            environment = {"OMP_NUM_THREADS": "1", **os.environ} if self._gpus > 1 else None
            began = time.monotonic()
            process = subprocess.Popen(self._command(task), stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                interrupted = self._wait(process, stop, task.name, Path(file.name))
            finally:
                if process.poll() is None:
                    process.kill()
        if stop.name or process.returncode == Interrupted.exit_code:
            on = f"on {stop.name} " if stop.name else ""
            raise Interrupted(f"stopped {on}in {task.name}: the same command goes on")
        if interrupted:
            raise OutOfTime
        if process.returncode or not task.done:
            lines = Path(file.name).read_text(errors="replace").strip().splitlines()
            raise UserError(f"{task.name} failed ({lines[-1] if lines else 'no output'}): see {file.name}")
        self._seconds.append(time.monotonic() - began)

    def _command(self, task: Task) -> list[str]:
        command = [sys.executable, "-m"]
        if self._gpus > 1:
            # The -- keeps torchrun from taking --run for an abbreviation of its own --run-path.
            command += [
                "jigsaw_pretrain.train.engine.launch",
                "--standalone",
                "--nproc-per-node",
                str(self._gpus),
                "-m",
                "--",
            ]
        return [*command, task.module, *task.arguments]

    def _wait(self, process: "subprocess.Popen[bytes]", stop: StopRequest, name: str, file: Path) -> bool:
        """Wait for the process; True where it had to be stopped early (it then saves a checkpoint).

        name, file: of the training, and what it logs to.
        """
        console, told, shown = Console(), time.monotonic(), ""
        first: tuple[float, int] | None = None
        moving = console.status(name) if console.is_terminal else None
        with moving or contextlib.nullcontext():
            while process.poll() is None:
                over = self._until is not None and time.monotonic() > self._until
                if over or stop.name:
                    process.terminate()
                    try:
                        process.wait(GRACE)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                    return True
                time.sleep(0.2)
                line = _progress(file)
                if line == shown:
                    continue
                if found := _STEPS.match(line):
                    done, steps = map(int, found.groups())
                    first = first or (time.monotonic(), done)
                    told_of = f"{name}{self._left(first, done, steps)}: {line}"
                    if moving is not None:
                        # A spinner forgets that its text does not wrap.
                        one_line = Text(told_of)
                        one_line.truncate(console.width - 2, overflow="ellipsis")
                        moving.update(one_line)
                        shown = line
                    elif time.monotonic() - told >= TOLD_EVERY:
                        told, shown = time.monotonic(), line
                        log.info("%s", told_of)
        return False

    def _left(self, first: tuple[float, int], done: int, steps: int) -> str:
        """How long all trainings will still take if those to come are like those so far; empty where nothing tells.

        first: when this training was seen first, and how many steps it had done. done, steps: now, and in all.
        """
        if self._total is None or done <= first[1]:
            return ""
        pace = (time.monotonic() - first[0]) / (done - first[1])
        each = statistics.mean([*self._seconds, pace * steps])
        seconds = pace * (steps - done) + max(0, self._total - len(self._begun)) * each
        return f" (all: about {timedelta(seconds=round(seconds))} left)"


_STEPS = re.compile(r"step (\d+)/(\d+)")


def _progress(file: Path) -> str:
    """The newest line of progress in a training's log; empty where there is none among the last."""
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
        lines = stream.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("step ")), "")
