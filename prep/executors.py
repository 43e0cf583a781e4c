"""Where part tasks run: in this process, in local processes, on a Dask cluster, or as tasks of an array job.

Local processes by default. Anything that offers ``submit`` will do, as a task is a picklable function of a picklable
description. ``run_tasks`` hands tasks over as executors become free, so a million crops never wait in a queue at once.

Dask (``--scheduler tcp://host:port``): the cluster's workers must have this package and its lock installed (a part
refuses other versions, naming them), and reach images and output under the same names. docs/prep-cluster.md shows how
clusters are started on Slurm, PBS and Kubernetes. Prefer local processes on one machine.

Array jobs, where a scheduler starts N copies of a command and nothing coordinates them: task I of N takes the parts I,
I + N, I + 2N, ...; parts take about the same time, so tasks do too. Index and count come from the scheduler's own
variables where it sets them. Any task may be run again, at any time, on any machine.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import TypeVar

from jigsaw_pretrain.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

PATIENCE = "30s"
RETRIES = 3
"""How often Dask gives a part to another worker after its own was lost."""

_AWS, _KUBERNETES, _SLURM = "AWS_BATCH_JOB_ARRAY_INDEX", "JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID"


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InlineExecutor(Executor):
    """Runs each task at once in this process: for one worker, where a second process would only cost its start."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Run and return a finished future."""
        future: Future[object] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def local_executor(workers: int) -> Iterator[Executor]:
    """``workers`` processes of this machine; started afresh, as drivers of object stores do not survive a fork.

    An interrupt ends them at once: a part that is not done does not exist.
    """
    if workers == 1:
        yield InlineExecutor()
        return
    context = multiprocessing.get_context("spawn")
    ends, end = context.Pipe(duplex=False)
    with ends, end, ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(ends,)) as executor:
        try:
            yield executor
        except KeyboardInterrupt:
            end.close()
            raise


def _begin_worker(ends: "connection.Connection") -> None:
    """Leave signals to the parent, and end with it however it ends, or where it closes its end of the pipe."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel, ends), daemon=True).start()


def _end_with(sentinel: int, ends: "connection.Connection") -> None:
    connection.wait([sentinel, ends])
    os._exit(1)


@contextmanager
def dask_executor(address: str) -> Iterator[tuple[Executor, int]]:
    """An executor over a running cluster, and how many tasks keep it busy; raises UserError."""
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise UserError("--scheduler needs Dask. Install it: pip install 'jigsaw-pretrain[dask]'.") from error
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--scheduler {address}: no Dask scheduler answers there ({error}).") from error
    try:
        threads = sum(client.nthreads().values())
        executor = client.get_executor(pure=False, retries=RETRIES)
        try:
            yield executor, 2 * max(1, threads)
        except KeyboardInterrupt:
            executor.shutdown(wait=False)
            raise
        finally:
            executor.shutdown(wait=True)
    except KilledWorker as error:
        raise UserError(
            "A part was given to several Dask workers and each of them died, most likely for want of memory. Give them "
            "more, or fewer threads each, and run the same command again: it goes on where it stopped."
        ) from error
    finally:
        client.close()


@contextmanager
def open_executor(workers: int, scheduler: str | None) -> Iterator[tuple[Executor, int]]:
    """An executor, of a Dask cluster where one is named, and how many tasks to hand it at once."""
    if scheduler is not None:
        with dask_executor(scheduler) as found:
            yield found
    else:
        with local_executor(workers) as executor:
            yield executor, 2 * workers


def run_tasks(
    executor: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], at_once: int
) -> Iterator[Result]:
    """Results in the order of completion, at most ``at_once`` tasks handed over; the first exception ends the rest.

    Raises UserError where worker processes are killed, and whatever the function raises.
    """
    pending: set[Future[Result]] = set()
    waiting = iter(tasks)
    try:
        while True:
            while len(pending) < at_once and (task := next(waiting, None)) is not None:
                pending.add(executor.submit(function, task))
                if any(future.done() for future in pending):
                    break
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, most likely for want of memory. Run the same command again with fewer "
            "--workers: it goes on where it stopped."
        ) from error
    finally:
        for future in pending:
            future.cancel()


@dataclass(frozen=True)
class ArrayTask:
    """Task ``index`` (from 0) of ``count``."""

    index: int
    count: int

    def mine(self, parts: int) -> range:
        """The parts of this task."""
        return range(self.index, parts, self.count)


def array_task(index: int | None, count: int | None, environment: Mapping[str, str]) -> ArrayTask | None:
    """The task that options or a scheduler's variables name; None where there is no array. Raises UserError."""
    source = "--task-index"
    if index is None:
        source, index = _scheduled(environment)
        if index is None:
            if count is not None:
                raise UserError(
                    "--task-count is given without --task-index, and no scheduler says the index. Give both."
                )
            return None
    if count is None:
        known = {_SLURM: "SLURM_ARRAY_TASK_COUNT", _AWS: "AWS_BATCH_JOB_ARRAY_SIZE"}.get(source)
        count = _number(environment, known) if known else None
    if count is None:
        raise UserError(
            f"{source} says that this is task {index} of an array, and nothing says of how many. Give --task-count, or "
            f"unset {source} if this is no array job."
        )
    if not 0 <= index < count:
        raise UserError(f"There is no task {index} of {count}: tasks are numbered from 0 to {count - 1}.")
    return ArrayTask(index, count)


def _scheduled(environment: Mapping[str, str]) -> tuple[str, int | None]:
    """Which variable tells the index, and the index from 0."""
    if _SLURM in environment:
        # Slurm's ids are the user's own: --array=1-16 or 0-30:2.
        number, first = _number(environment, _SLURM), _number(environment, "SLURM_ARRAY_TASK_MIN") or 0
        step = _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
        return _SLURM, None if number is None else (number - first) // step
    for name in (_AWS, _KUBERNETES):
        if name in environment:
            return name, _number(environment, name)
    return "", None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name} is {text!r}, not a number. Unset it, or give --task-index.") from error
