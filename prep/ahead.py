"""Doing things ahead of their use: a function over a sequence by threads, results in order, few of them waiting.

For calls that wait (requests, disks); a thousand requests of 20 ms take a second or two. Work that computes goes to
processes (prep.executors).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL_THREADS, REMOTE_THREADS = 4, 16
"""How many things are asked for at the same time: the latency of a store is hidden by width."""


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """``function`` of each item in order, up to twice ``threads`` of them begun before they are taken."""
    coming = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(coming, 2 * threads))
        try:
            while waiting:
                result = waiting.popleft().result()
                for item in islice(coming, 1):
                    waiting.append(pool.submit(function, item))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
