"""Feeding tasks to executors."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jigsaw_pretrain.prep.executors import InlineExecutor, run_tasks


def slowly(number: int) -> int:
    time.sleep(0.001)
    return number


def test_every_result_comes_once_and_few_tasks_wait() -> None:
    started: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(20):
            started.append(number)
            yield number

    seen: list[int] = []
    with ThreadPoolExecutor(2) as executor:
        for result in run_tasks(executor, slowly, tasks(), 4):
            seen.append(result)
            assert len(started) - len(seen) <= 5
    assert sorted(seen) == list(range(20))


def test_inline_results_come_as_they_are_made() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    for count, result in enumerate(run_tasks(InlineExecutor(), make, iter(range(5)), 4)):
        assert result == count and len(made) == count + 1


def test_the_first_failure_ends_it() -> None:
    def fail(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    with ThreadPoolExecutor(1) as executor, pytest.raises(ValueError, match="two"):
        list(run_tasks(executor, fail, iter(range(100)), 2))
