"""The host's cache: one fetch a file, never a wrong byte, nothing evicted that is in use."""

import hashlib
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.train.data.remote import ReadOptions, RemoteShards, ShardCache
from tests.helpers.settings import REPOSITORY, SOAK
from tests.helpers.tiny import make_dataset


def content(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def key_of(number: int, size: int = 1000) -> str:
    return hashlib.sha256(content(number, size)).hexdigest()


class Source:
    """Fills files and counts how often."""

    def __init__(self, number: int, size: int = 1000, slow: float = 0.0) -> None:
        self.number, self.size, self.slow, self.fills = number, size, slow, 0

    def __call__(self, path: Path) -> None:
        self.fills += 1
        time.sleep(self.slow)
        path.write_bytes(content(self.number, self.size))

    def read(self, cache: ShardCache) -> bytes:
        with cache.open(key_of(self.number, self.size), self.size, self) as file:
            return file.read()


def test_a_file_is_filled_once_by_many_threads_and_caches(tmp_path: Path) -> None:
    source = Source(1, slow=0.05)
    caches = [ShardCache(tmp_path, 10_000) for _ in range(3)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda nth: source.read(caches[nth % 3]), range(24)))
    assert set(found) == {content(1)} and source.fills == 1


def test_the_least_recently_used_goes_first_and_what_is_mapped_stays(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3_500)
    sources = [Source(number) for number in range(6)]
    with cache.open(key_of(0), 1000, sources[0]) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for number in (1, 2, 1, 3, 4):
        time.sleep(0.01)
        sources[number].read(cache)
    held = {path.name for path in cache.folder.iterdir() if path.is_file() and path.suffix != ".lock"}
    assert held == {key_of(number) for number in (0, 3, 4)} and cache.held() == 3000
    assert bytes(mapped) == content(0)
    mapped.close()
    sources[5].read(cache)
    assert not (cache.folder / key_of(0)).exists()


def test_everything_in_use_goes_over_the_limit(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1_500)
    files = [cache.open(key_of(number), 1000, Source(number)) for number in range(3)]
    assert cache.held() == 3000
    for file in files:
        file.close()
    Source(3).read(cache)
    assert cache.held() == 1000


def test_a_file_of_another_size_is_filled_again(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, 10_000), Source(1)
    source.read(cache)
    (cache.folder / key_of(1)).write_bytes(content(1)[:10])
    assert source.read(cache) == content(1) and source.fills == 2


def test_an_index_that_has_grown_is_fetched_again_and_not_read_to_its_end(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", {"S": [3], "T": [2], "W": [2]})
    url = "memory://grown"
    fsspec.filesystem("memory").put(str(tmp_path / "data"), "/grown", recursive=True)
    access = ReadOptions(cache=tmp_path / "cache")
    shards = RemoteShards(access.open_dataset(url), access)
    with shards.index() as index:
        whole = index.read()
    (cached,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.read_bytes() == whole]
    os.truncate(cached, 1 << 40)
    with shards.index() as index:
        assert index.read() == whole
    shards.close()


def test_a_failed_fill_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10_000)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("broken")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="broken"):
        cache.open(key_of(1), 1000, fail)
    with pytest.raises(UserError, match="the disk is full"):
        cache.open(key_of(1), 1000, full)
    assert cache.held() == 0
    with pytest.raises(UserError, match="--cache"):
        ShardCache(Path("/proc/none"))


READER = """
import hashlib, random, sys
from pathlib import Path
from tests.train.data.test_remote_cache import Source, content
from jigsaw_pretrain.train.data.remote import ShardCache
cache, seed = ShardCache(Path(sys.argv[1]), 60_000), int(sys.argv[2])
draws = random.Random(seed)
print("begun", flush=True)
while True:
    number = draws.randrange(12)
    size = 10_000
    if Source(number, size, slow=0.001).read(cache) != content(number, size):
        print("WRONG", number, flush=True)
        sys.exit(3)
"""


@pytest.mark.slow(seconds=8)
def test_two_processes_under_kills_never_serve_a_wrong_byte(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(seed: int) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", READER, str(tmp_path), str(seed)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    steady = start(0)
    try:
        for kill in range(100 if SOAK else 4):
            victim = start(kill + 1)
            assert victim.stdout is not None and victim.stdout.readline() == "begun\n"
            time.sleep(random.Random(kill).uniform(0.02, 0.2))
            os.kill(victim.pid, signal.SIGKILL)
            assert victim.wait() == -signal.SIGKILL, victim.stdout.read()
            assert steady.poll() is None
    finally:
        steady.kill()
        steady.wait()
    cache = ShardCache(tmp_path, 60_000)
    for number in range(12):
        assert Source(number, 10_000).read(cache) == content(number, 10_000)
    # What the dead were filling is gone.
    assert not [path for path in cache.folder.iterdir() if path.name.endswith(".part")]
    assert cache.held() <= 60_000
