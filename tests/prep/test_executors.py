"""Local processes, a Dask cluster and array tasks give one tree; tasks are fed as fast as results come."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from distributed import LocalCluster

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.prep.commands.finish import finish_command
from jigsaw_pretrain.prep.executors import ArrayTask, InlineExecutor, array_task, local_executor, run_tasks
from tests.helpers.prepped import Small, invoke, tree


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


def test_an_interrupt_ends_local_processes_in_the_middle_of_a_task() -> None:
    with pytest.raises(KeyboardInterrupt), local_executor(2) as executor:
        future = executor.submit(time.sleep, 60)
        while not future.running():
            time.sleep(0.01)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30


def test_local_processes_give_the_same_tree(small: Small, tmp_path: Path) -> None:
    result = small.run(tmp_path / "out", "--workers", "2")
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "out") == small.tree


@pytest.mark.slow(seconds=5)
def test_a_dask_cluster_gives_the_same_tree(small: Small, tmp_path: Path) -> None:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
    ) as cluster:
        result = small.run(tmp_path / "out", "--scheduler", cluster.scheduler_address)
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "out") == small.tree


def test_no_scheduler_is_said_plainly(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jigsaw_pretrain.prep.executors.PATIENCE", "1s")
    result = small.run(tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
    assert result.exit_code == 2 and "no Dask scheduler answers" in result.output


def test_four_array_tasks_and_finish_give_the_same_tree(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for number in (3, 1, 4, 2):
        assert "not done" in (said := invoke(finish_command, "--out", str(out)).output) or "nothing was begun" in said
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        result = small.run(out)
        assert result.exit_code == 0 and "jigsaw-prep finish" in result.output, result.output
    assert not (out / "manifests" / "dataset.json").exists()
    assert invoke(finish_command, "--out", str(out)).exit_code == 0
    assert tree(out) == small.tree


@pytest.mark.parametrize(
    ("index", "count", "environment", "expected"),
    [
        (None, None, {}, None),
        (2, 5, {}, ArrayTask(2, 5)),
        (2, 5, {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "10"}, ArrayTask(2, 5)),
        (None, None, {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "10"}, ArrayTask(9, 10)),
        (
            None,
            None,
            {
                "SLURM_ARRAY_TASK_ID": "8",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "2",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            ArrayTask(3, 4),
        ),
        (None, 7, {"AWS_BATCH_JOB_ARRAY_INDEX": "6"}, ArrayTask(6, 7)),
        (None, None, {"AWS_BATCH_JOB_ARRAY_INDEX": "6", "AWS_BATCH_JOB_ARRAY_SIZE": "8"}, ArrayTask(6, 8)),
        (None, 3, {"JOB_COMPLETION_INDEX": "0"}, ArrayTask(0, 3)),
    ],
)
def test_where_the_index_comes_from(
    index: int | None, count: int | None, environment: dict[str, str], expected: ArrayTask | None
) -> None:
    assert array_task(index, count, environment) == expected


@pytest.mark.parametrize(
    ("index", "count", "environment", "said"),
    [
        (None, 3, {}, "without --task-index"),
        (3, None, {}, "--task-count"),
        (3, 3, {}, "no task 3 of 3"),
        (None, None, {"JOB_COMPLETION_INDEX": "1"}, "unset JOB_COMPLETION_INDEX"),
        (None, 3, {"SLURM_ARRAY_TASK_ID": "x"}, "not a number"),
    ],
)
def test_arrays_that_make_no_sense(
    index: int | None, count: int | None, environment: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        array_task(index, count, environment)


def test_every_part_is_one_tasks() -> None:
    assert sorted(part for index in range(4) for part in ArrayTask(index, 4).mine(11)) == list(range(11))
