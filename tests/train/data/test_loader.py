"""The loader: the same batches for any number of ranks and workers, and no hang and no silence when one dies."""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from multiprocessing.context import ForkProcess, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from jigsaw_pretrain.detect.data import SampleLoader
from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.train.data.lanes import GroupLanes, OpenUnit
from jigsaw_pretrain.train.data.loader import IN_FLIGHT, JigsawLoader, digest, worker_context
from tests.helpers.sources import small_data
from tests.helpers.tiny import all_crops, make_dataset, spoil

OPTIONS = small_data(batch=16, lanes=8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("loader"), {"S": [25, 14], "T": [11, 9, 3], "W": [20]})


def lines(
    dataset: Dataset, world: int, workers: int, first: int = 0, steps: int = 5, start_method: str | None = None
) -> list[str]:
    found = digest(dataset, OPTIONS, world=world, workers=workers, first=first, steps=steps, start_method=start_method)
    return list(found)


@pytest.fixture(scope="module")
def expected(dataset: Dataset) -> list[str]:
    return lines(dataset, 1, 0)


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 0), (2, 1), (2, 3), (4, 0), (4, 1), (4, 3)])
def test_lines_do_not_depend_on_ranks_and_workers(
    dataset: Dataset, expected: list[str], world: int, workers: int
) -> None:
    assert lines(dataset, world, workers) == expected
    assert len({line.split()[1] for line in expected}) == len(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_continues_the_same_run(dataset: Dataset, expected: list[str], workers: int) -> None:
    assert lines(dataset, 2, workers, first=3, steps=2) == expected[3:5]


@pytest.mark.slow(seconds=8)
def test_spawned_workers_agree(dataset: Dataset, expected: list[str]) -> None:
    # Workers of a forkserver are tried on a store's shards, in test_remote.py: starting either takes seconds.
    assert lines(dataset, 1, 1, steps=2, start_method="spawn") == expected[:2]


def test_a_far_step_opens_no_more_units_than_a_near_one(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    locate, opened = GroupLanes.locate, []

    def counted(self: GroupLanes, lane: int, position: int) -> OpenUnit:
        opened.append(position)
        return locate(self, lane, position)

    monkeypatch.setattr(GroupLanes, "locate", counted)

    def work(first: int) -> int:
        opened.clear()
        assert len(lines(dataset, 1, 0, first=first, steps=1)) == 1
        return len(opened)

    assert 0 < work(60_000_000) <= 2 * work(0)


def test_batches_have_their_shapes_and_a_rank_its_lanes(dataset: Dataset) -> None:
    whole = next(iter(JigsawLoader(dataset, OPTIONS, workers=0)))
    assert whole.images.shape == (16, 96, 96, 3) and whole.images.dtype == torch.uint8
    assert whole.labels.shape == (16, 4) and whole.labels.dtype == torch.int64
    assert whole.groups.shape == (16, 4) and whole.groups.dtype == torch.uint8
    assert whole.digests is None and whole.replaced == 0
    loader = JigsawLoader(dataset, OPTIONS, rank=1, world=2, workers=2)
    assert loader.lanes_per_rank == 4
    part = next(iter(loader))
    lanes = whole.images.view(8, 2, 96, 96, 3)[1::2]
    assert (part.images.view(4, 2, 96, 96, 3) == lanes).all()
    assert (part.labels.view(4, 2, 4) == whole.labels.view(8, 2, 4)[1::2]).all()
    assert (part.groups.view(4, 2, 4) == whole.groups.view(8, 2, 4)[1::2]).all()
    loader.close()


def test_the_first_jigsaws_are_those_of_the_first_batches(dataset: Dataset) -> None:
    options = small_data(batch=4, lanes=2)
    loader = JigsawLoader(dataset, options, workers=0)
    whole = [(batch.images.clone(), batch.labels, batch.groups) for batch, _ in zip(loader, range(3), strict=False)]
    first = loader.first(10)
    for found, parts in zip((first.images, first.labels, first.groups), zip(*whole, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts)[:10])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_stays_valid_until_the_next_but_one(dataset: Dataset, workers: int) -> None:
    loader = JigsawLoader(dataset, OPTIONS, workers=workers)
    batches = iter(loader)
    for _ in range(4):
        batch = next(batches)
        copy = batch.images.clone()
        for _ in range(2):
            # Time for workers to go as far ahead as they can.
            time.sleep(0.1 if workers else 0)
            assert (batch.images == copy).all()
            before, batch = batch, next(batches)
            assert (before.images == copy).all()
            copy = batch.images.clone()
    loader.close()


def test_a_second_iterator_starts_anew(dataset: Dataset) -> None:
    loader = JigsawLoader(dataset, OPTIONS, workers=1, start_step=2)
    assert [next(iter(loader)).step for _ in range(2)] == [2, 2]
    loader.close()
    loader.close()


def test_more_workers_than_lanes_are_not_started(dataset: Dataset, expected: list[str]) -> None:
    assert lines(dataset, 4, 7, steps=1) == expected[:1]


def test_what_cannot_be_shared_is_refused_with_the_remedy(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"8 lanes cannot be shared .* 3 processes: run on one of \[1, 2, 4, 8\]"):
        JigsawLoader(dataset, OPTIONS, world=3)
    with pytest.raises(UserError, match=r"data.lanes .*\[16\]"):
        JigsawLoader(dataset, OPTIONS, world=16)
    with pytest.raises(UserError, match="rank 2"):
        JigsawLoader(dataset, OPTIONS, rank=2, world=2)
    with pytest.raises(UserError, match="workers -1"):
        JigsawLoader(dataset, OPTIONS, workers=-1)


def test_replacements_are_counted_across_workers(tmp_path: Path) -> None:
    damaged = make_dataset(tmp_path, {"S": [16], "T": [8], "W": [8]})
    spoil(damaged, next(iter(all_crops(damaged))))
    for workers in (0, 2):
        loader = JigsawLoader(damaged, OPTIONS, workers=workers, stop_step=4)
        # Every lane draws every S crop once in 8 jigsaws: 8 lanes, 8 jigsaws each.
        assert sum(batch.replaced for batch in loader) == 8


def test_a_users_mistake_in_a_worker_stays_one_line(tmp_path: Path) -> None:
    broken = make_dataset(tmp_path, {"S": [6], "T": [3], "W": [3]})
    (tmp_path / layout.SHARDS / "W-000000.tar").unlink()
    with pytest.raises(UserError) as caught:
        next(iter(JigsawLoader(broken, OPTIONS, workers=2)))
    assert "W-000000.tar is missing" in caught.value.message and "\n" not in caught.value.message


def children() -> list[int]:
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    if not task.exists():
        pytest.skip("needs /proc to find the workers")
    return [int(word) for word in task.read_text().split()]


def in_shared_memory() -> set[str]:
    """What of this process lies in /dev/shm; what has no name there any more is marked as deleted."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line[line.index("/dev/shm/") :] for line in maps if "/dev/shm/" in line}


@contextmanager
def started_by(method: str) -> Iterator[None]:
    """What ``multiprocessing.set_start_method`` sets, for a while."""
    own = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(own, force=True)


def test_a_start_method_that_a_program_sets_is_kept() -> None:
    with started_by("spawn"):
        assert worker_context().get_start_method() == "spawn"
        assert worker_context("fork").get_start_method() == "fork"


@pytest.mark.skipif(sys.platform != "linux", reason="forks are Linux's")
@pytest.mark.parametrize("stage", ["train", "detect"])
def test_workers_are_forks_under_pythons_that_start_processes_otherwise(
    dataset: Dataset, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*process: object) -> None:
        raise AssertionError(f"{process[-1]} is no fork")

    monkeypatch.setattr(ForkServerProcess, "_Popen", refused)
    # Numbers in place of samples, which are nothing to the worker.
    numbers: Any = [7]
    loader = JigsawLoader(dataset, OPTIONS, workers=1) if stage == "train" else SampleLoader(numbers, [[0]], workers=1)
    # As Python has it from 3.14 on: a script needs a guard for it, and each worker imports torch.
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["forkserver", "fork", "spawn"])
    before = set(multiprocessing.active_children())
    with started_by("forkserver"):
        batches: Iterator[object] = iter(loader)
        next(batches)
        assert [type(one) for one in set(multiprocessing.active_children()) - before] == [ForkProcess]


def test_a_kill_of_all_leaves_nothing_in_shared_memory(dataset: Dataset) -> None:
    """As nothing there has a name while they run."""
    before = in_shared_memory()
    batches = iter(JigsawLoader(dataset, OPTIONS, workers=2))
    next(batches)
    own = in_shared_memory() - before
    assert own and all(name.endswith(" (deleted)") for name in own)


def test_a_dead_worker_ends_the_run_with_its_reason(dataset: Dataset) -> None:
    before = set(children())
    loader = JigsawLoader(dataset, OPTIONS, workers=2)
    batches = iter(loader)
    next(batches)
    workers = set(children()) - before
    assert len(workers) == 2
    os.kill(workers.pop(), signal.SIGKILL)
    # What was under way may still come, and nothing after it.
    with pytest.raises(UserError, match="worker ended unexpectedly"):
        for _ in range(IN_FLIGHT):
            next(batches)
    loader.close()
    assert not set(children()) - before


def starts_with(dataset: Dataset, room: int) -> bool:
    """Whether two workers can be started where so many more files may be open; asserts that none is left where not."""
    open_files = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    most = next(islice((number for number in count() if number not in open_files), room, None))
    before, (soft, hard) = set(children()), resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = JigsawLoader(dataset, OPTIONS, workers=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    kept = None
    try:
        next(iter(loader))
    except (OSError, RuntimeError, UserError) as error:
        # A command, too, ends while its error refers to what could not be made.
        kept = error
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    loader.close()
    assert not set(children()) - before
    return kept is None


def test_where_not_all_workers_can_start_none_is_left(dataset: Dataset) -> None:
    # A worker ignores the signal by which Python ends its children, so one that is left is waited for without end.
    rooms = range(1, 40)
    enough = next(room for room in rooms if starts_with(dataset, room))
    # With fewer open files a start was refused, in each of which no worker is left.
    assert enough > rooms[0]


def test_workers_leave_signals_to_the_rank_and_end_with_the_loader(dataset: Dataset) -> None:
    before = set(children())
    loader = JigsawLoader(dataset, OPTIONS, workers=2)
    batches = iter(loader)
    next(batches)
    for worker in set(children()) - before:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    for _ in range(20):
        next(batches)
    loader.close()
    assert not set(children()) - before


def test_room_in_shared_memory_is_asked_for_all_loaders_at_one_time(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("jigsaw_pretrain.train.data.loader.check_shared_memory", asked.append)
    for rings in (1, 2):
        JigsawLoader(dataset, OPTIONS, workers=1, rings=rings).close()
    assert asked[1] == 2 * asked[0] > 0
