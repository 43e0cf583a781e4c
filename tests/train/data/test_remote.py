"""Shards in an object store: the same batches as from a folder, and no more requests than needed."""

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import Dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.rng import key_of_text
from jigsaw_pretrain.train.data.lanes import GroupLanes
from jigsaw_pretrain.train.data.loader import JigsawLoader, check_shared_memory
from jigsaw_pretrain.train.data.remote import AHEAD, THREADS_PER_GROUP, ReadOptions, RemoteShards
from jigsaw_pretrain.train.recipe import DataOptions
from tests.helpers.servers import FaultyProxy, Store
from tests.helpers.sources import small_data
from tests.helpers.stores import OPTIONS, gets, lines, proxied_store, upload
from tests.helpers.tiny import make_dataset


class Remote:
    """A dataset in a folder and the same one behind the proxy of a store."""

    def __init__(self, url: str, store: Store, proxy: FaultyProxy, local: Dataset) -> None:
        self.url, self.store, self.proxy, self.local = url, store, proxy, local
        self.expected = lines(local)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("remote")
    local = make_dataset(folder, {"S": [25, 14], "T": [11, 9, 3], "W": [20]})
    with proxied_store() as (store, proxy):
        yield Remote(upload(store, folder, "set"), store, proxy, local)


@pytest.mark.slow(seconds=21)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("world", "workers"),
    [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 3)],
)
def test_lines_are_those_of_the_folder(remote: Remote, tmp_path: Path, world: int, workers: int, cached: bool) -> None:
    access = ReadOptions(cache=tmp_path / "cache" if cached else None)
    # This process uses the store first, and a forked worker all the same builds its own driver.
    dataset = access.open_dataset(remote.url)
    before = len(gets(remote.proxy))
    found = lines(dataset, access, world=world, workers=workers, start_method="fork", steps=3)
    assert found == remote.expected[:3]
    if cached:
        assert len(gets(remote.proxy)) - before == len(dataset.shards)


@pytest.mark.slow(seconds=12)
def test_forkserver_and_a_resume_on_other_ranks(remote: Remote, tmp_path: Path) -> None:
    # Its workers are given the same, pickled, as spawned ones, which test_loader.py starts on a folder's shards.
    # A server that another test started knows nothing of this store's credentials.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    access = ReadOptions(cache=tmp_path)
    dataset = access.open_dataset(remote.url)
    assert lines(dataset, access, world=1, workers=1, start_method="forkserver", steps=2) == remote.expected[:2]
    assert lines(dataset, access, world=4, workers=1, first=2, steps=2) == remote.expected[2:4]
    assert lines(dataset, access, world=2, workers=3, first=4, steps=1) == remote.expected[4:5]


@pytest.mark.slow(seconds=6)
def test_a_far_step_costs_a_request_a_stream(remote: Remote, tmp_path: Path) -> None:
    options = small_data(batch=8, lanes=8)
    big = make_dataset(tmp_path / "big", {"S": [12] * 40, "T": [6] * 40, "W": [6] * 40})
    url = upload(remote.store, tmp_path / "big", "big")
    access = ReadOptions(cache=tmp_path / "cache")
    dataset = access.open_dataset(url)
    streams = options.lane_count * 3
    for first, cache in ((60_000, "a"), (0, "b")):
        before = len(gets(remote.proxy))
        access = ReadOptions(cache=tmp_path / cache)
        found = lines(dataset, access, first=first, steps=1, options=options)
        time.sleep(0.5)
        assert len(gets(remote.proxy)) - before <= streams * (1 + AHEAD)
        assert found == lines(big, first=first, steps=1, options=options)
    # All shards of a group's streams were asked for before any of the group was fetched ahead.
    asked = [path.split("/")[-1] for path in gets(remote.proxy)[before:]]
    for group in GROUPS:
        opened = {shard_of(dataset, options, lane, group) for lane in range(8)}
        of_group = [name for name in asked if name.startswith(group)]
        assert len(opened) > THREADS_PER_GROUP and set(of_group[: len(opened) - THREADS_PER_GROUP]) <= opened


def shard_of(dataset: Dataset, options: DataOptions, lane: int, group: str) -> str:
    of_group = dataset.of_group(group)
    lanes = GroupLanes([shard.crops for shard in of_group], options.lane_count, key_of_text(0, f"group {group}"))
    return of_group[lanes.locate(lane, 0).shard].name


class TwentyOfEach:
    """Each kind of fault, dealt out over the requests until there were twenty of it."""

    def __init__(self, each: int = 20) -> None:
        self.left = dict.fromkeys(("500", "reset", "short", "stall"), each)
        self.lock = threading.Lock()

    def __call__(self, number: int, method: str, path: str) -> str | None:
        with self.lock:
            kinds = [kind for kind, left in self.left.items() if left]
            # Two of three, so that five retries are all but sure to reach the honest one.
            if not kinds or "/shards/" not in path or number % 3 == 2:
                return None
            kind = kinds[number % len(kinds)]
            self.left[kind] -= 1
            return kind


@pytest.mark.slow(seconds=15)
def test_faults_change_no_batch(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jigsaw_pretrain.storage.retries.FIRST_PAUSE", 0.02)
    many = make_dataset(tmp_path / "many", {"S": [10] * 24, "T": [5] * 20, "W": [5] * 20})
    access = ReadOptions(cache=None, read_timeout=0.5, read_retries=30)
    dataset = access.open_dataset(upload(remote.store, tmp_path / "many", "many"))
    options = small_data(batch=4, lanes=4)
    expected = lines(many, steps=200, options=options)
    remote.proxy.faults, remote.proxy.stall = TwentyOfEach(), 1.0
    before = len(remote.proxy.log)
    try:
        found = lines(dataset, access, steps=200, workers=2, options=options)
    finally:
        remote.proxy.faults = None
    assert found == expected
    kinds = Counter(entry.fault for entry in remote.proxy.log[before:] if entry.fault)
    assert all(kinds[kind] >= 20 for kind in ("500", "reset", "short", "stall")), kinds


def test_without_a_cache_the_next_process_removes_what_a_killed_one_was_fetching(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    access = ReadOptions(cache=None, read_timeout=30)
    dataset = access.open_dataset(remote.url)

    def fetch() -> None:
        RemoteShards(dataset, access).open(dataset.shards[0])

    def found() -> list[Path]:
        return list(tmp_path.glob("jigsaw-shard-*"))

    def aged() -> list[Path]:
        for path in found():
            os.utime(path, (time.time() - 3600,) * 2)
        return found()

    remote.proxy.faults, remote.proxy.stall = lambda number, method, path: "stall" if "/shards/" in path else None, 30
    fetching = multiprocessing.get_context("fork").Process(target=fetch)
    try:
        fetching.start()
        deadline = time.monotonic() + 20
        while not found() and time.monotonic() < deadline:
            time.sleep(0.01)
        # In use, however old.
        time.sleep(0.1)
        used = aged()
        RemoteShards(dataset, access).close()
        assert found() == used != []
    finally:
        fetching.kill()
        fetching.join()
        remote.proxy.faults = None
    other = tmp_path / "jigsaw-shard-pipe"
    os.mkfifo(other)
    # It may be a living process's that has not locked it yet.
    os.utime(used[0])
    RemoteShards(dataset, access).close()
    assert set(found()) == {*used, other}
    aged()
    RemoteShards(dataset, access).close()
    assert found() == [other]


def test_a_store_that_stays_down_is_named(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jigsaw_pretrain.storage.retries.FIRST_PAUSE", 0.01)
    access = ReadOptions(cache=tmp_path, read_retries=2)
    dataset = access.open_dataset(remote.url)
    remote.proxy.faults = lambda number, method, path: "500" if "T-000001" in path else None
    try:
        with pytest.raises(UserError, match=r"T-000001.tar cannot be read after 3 attempts .*check the store"):
            lines(dataset, access, workers=1)
        remote.proxy.faults = lambda number, method, path: "500"
        with pytest.raises(UserError, match="set/manifests cannot be read after 3 attempts"):
            access.open_dataset(remote.url)
    finally:
        remote.proxy.faults = None


@pytest.mark.slow(seconds=7)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_byte_is_found_and_named_or_skipped(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("jigsaw_pretrain.storage.retries.FIRST_PAUSE", 0.01)
    make_dataset(tmp_path / "set", {"S": [20, 20], "T": [9, 9], "W": [10]})
    shard = tmp_path / "set" / "shards" / "S-000001.tar"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    url = upload(remote.store, tmp_path / "set", f"flipped-{workers}")
    access = ReadOptions(cache=tmp_path / "cache", read_retries=1)
    dataset = access.open_dataset(url)
    before = len(gets(remote.proxy))
    with pytest.raises(UserError, match=r"S-000001.tar has sha256 .* where the manifest says .*--on-bad-shard skip"):
        lines(dataset, access, workers=workers)
    if not workers:
        assert sum("S-000001" in path for path in gets(remote.proxy)[before:]) == 2
    skipping = replace(access, on_bad_shard="skip")
    found = lines(dataset, skipping, workers=workers, steps=8)
    # The position alone decides what stands in: a later start finds the same.
    assert lines(dataset, skipping, workers=1, world=2, first=5, steps=3) == found[5:]
    loader = JigsawLoader(dataset, OPTIONS, workers=workers, stop_step=8, access=skipping)
    batches = list(loader)
    assert [name for name, _ in batches[-1].left_out] == ["S-000001.tar"]
    assert all(batch.replaced == 0 for batch in batches)


def test_a_missing_shard_is_named(remote: Remote, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", {"S": [20], "T": [9], "W": [10]})
    (tmp_path / "set" / "shards" / "W-000000.tar").unlink()
    access = ReadOptions(cache=tmp_path / "cache")
    dataset = access.open_dataset(upload(remote.store, tmp_path / "set", "missing"))
    with pytest.raises(UserError, match=r"W-000000.tar is missing: run .*verify --repair"):
        lines(dataset, access)
    # With its group's only shard gone, the next group by aspect stands in.
    assert len(lines(dataset, replace(access, on_bad_shard="skip"))) == 5


def test_too_small_a_cache_is_said_with_the_figure(remote: Remote, tmp_path: Path) -> None:
    access = ReadOptions(cache=tmp_path, cache_bytes=1000)
    dataset = access.open_dataset(remote.url)
    with pytest.raises(UserError, match="may hold 1,000 bytes") as caught:
        JigsawLoader(dataset, OPTIONS, access=access)
    needed = int(caught.value.message.split("--cache-bytes ")[1].split()[0])
    assert needed == sum(shard.bytes for shard in dataset.shards)
    JigsawLoader(dataset, OPTIONS, access=replace(access, cache_bytes=needed))
    # A folder needs no cache.
    JigsawLoader(remote.local, OPTIONS, access=access)


def test_shared_memory_too_small_is_said_with_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 * 2**20))
    batches = 4 * 512 * 224 * 224 * 3
    with pytest.raises(UserError, match=r"has 64 MB free, .* up to 323 MB .*--shm-size=340m"):
        check_shared_memory(batches, tmp_path)
    check_shared_memory(58 * 2**20, tmp_path)
    # What would just fit leaves torch and NCCL no room.
    with pytest.raises(UserError, match="--shm-size"):
        check_shared_memory(60 * 2**20, tmp_path)
    check_shared_memory(batches, tmp_path / "none")
