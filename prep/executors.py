"""Where part tasks run: concurrent.futures executors, and the one loop that feeds them.

Local processes by default. Anything that offers ``submit`` will do, as a task is a picklable function of a picklable
description. Tasks are handed over as places fall free, so a million crops never wait in a queue at once.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import TypeVar

from jigsaw_pretrain.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


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


def local_executor(workers: int) -> Executor:
    """``workers`` processes of this machine; started afresh, as drivers of object stores do not survive a fork."""
    if workers == 1:
        return InlineExecutor()
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin_worker)


@contextmanager
def open_executor(workers: int, scheduler: str | None) -> Iterator[tuple[Executor, int]]:
    """An executor, of a Dask cluster where one is named, and how many tasks to hand it at once."""
    if scheduler is not None:
        from jigsaw_pretrain.prep.cluster import dask_executor

        with dask_executor(scheduler) as found:
            yield found
    else:
        with local_executor(workers) as executor:
            yield executor, 2 * workers


def _begin_worker() -> None:
    """Leave interrupts to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


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


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
