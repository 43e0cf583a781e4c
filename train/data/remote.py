"""Shards of an object store as local files, fetched ahead of their use by threads.

Each lane's stream says which shard it draws from next; four threads a group fetch them, so the three groups come in
parallel and a slow one holds up no other. A fetch is mostly waiting, so that more threads cost little: 7 ms of
CPU time in 35 for a shard of 130 KB. What a lane waits for goes first, then what lanes begin with, then what they
draw from next. A fetched file is held (and so kept in the cache) until its lane takes it. Build it in the process that
reads; its threads end with the process whatever they are doing.
"""

import contextlib
import hashlib
import mmap
import queue
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import Dataset, ShardRow
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.storage import Fetcher, WrongContent
from jigsaw_pretrain.train.data.access import Access
from jigsaw_pretrain.train.data.cache import Cache

THREADS_PER_GROUP = 4

NOW, FIRST, NEXT = range(3)
"""How urgent a shard is: a lane waits for it, a lane begins with it, a lane draws from it next."""


@dataclass
class _Job:
    """A shard to be fetched once, by whichever thread claims it first."""

    shard: ShardRow
    file: "Future[BinaryIO]" = field(default_factory=Future)
    claim: threading.Lock = field(default_factory=threading.Lock)


class RemoteShards:
    """The shards of a dataset at a URL; a train.crops.ShardFiles. Used by one thread."""

    def __init__(self, dataset: Dataset, access: Access) -> None:
        self._dataset = dataset
        connections = THREADS_PER_GROUP * len(GROUPS) + 1
        self._fetcher = Fetcher(dataset.url, access.read_retries, access.read_timeout, connections)
        self._cache = None if access.cache is None else Cache(access.cache, access.cache_bytes)
        self._jobs: dict[int, _Job] = {}
        self._queues: dict[str, queue.PriorityQueue[tuple[int, int, _Job | None]]] = {}
        self._asked = 0

    def index(self) -> mmap.mmap:
        """The bytes of crops.parquet, mapped: fetched whole, once a host; raises UserError where it is damaged."""
        shards = len(self._dataset.shards)

        def check(path: Path) -> None:
            try:
                with pq.ParquetFile(str(path)) as file:
                    found = file.num_row_groups
            except (OSError, ValueError) as error:
                raise WrongContent(f"is damaged ({error})") from error
            if found != shards:
                raise WrongContent(f"has {found} row groups for {shards} shards")

        # No manifest has its hash: what is cached belongs to exactly this dataset.json and shards.parquet.
        key = hashlib.sha256(f"{self._dataset.fingerprint} {layout.CROPS}".encode()).hexdigest()
        try:
            with self._file(key, None, lambda path: self._fetcher.fetch(layout.CROPS, path, check)) as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (WrongContent, FileNotFoundError) as error:
            raise UserError(
                f"{self._dataset.url.rstrip('/')}/{layout.CROPS} cannot be used ({error}): run `jigsaw-prep verify "
                "--repair`, or prep the dataset again"
            ) from error

    def ask(self, shard: ShardRow, urgency: int) -> None:
        """Fetch a shard ahead of time; asking again may make it more urgent."""
        if shard.index not in self._jobs:
            self._jobs[shard.index] = _Job(shard)
        self._enqueue(self._jobs[shard.index], urgency)

    def open(self, shard: ShardRow) -> BinaryIO:
        """The shard's file, once it is here; the caller closes it. Raises BadShard, UserError."""
        job = self._jobs.get(shard.index) or _Job(shard)
        self._enqueue(job, NOW)
        try:
            return job.file.result()
        finally:
            self._jobs.pop(shard.index, None)

    def close(self) -> None:
        """End the threads once they have done what they are at, and let go of what was fetched ahead."""
        for waiting in self._queues.values():
            for _ in range(THREADS_PER_GROUP):
                waiting.put((-1, 0, None))
        for job in self._jobs.values():
            if not job.claim.acquire(blocking=False):
                job.file.add_done_callback(_close_file)
        self._jobs.clear()

    def _enqueue(self, job: _Job, urgency: int) -> None:
        group = job.shard.group
        if group not in self._queues:
            self._queues[group] = queue.PriorityQueue()
            for _ in range(THREADS_PER_GROUP):
                threading.Thread(target=self._work, args=(self._queues[group],), daemon=True).start()
        self._asked += 1
        self._queues[group].put((urgency, self._asked, job))

    def _work(self, waiting: "queue.PriorityQueue[tuple[int, int, _Job | None]]") -> None:
        while (job := waiting.get()[2]) is not None:
            if job.claim.acquire(blocking=False):
                try:
                    job.file.set_result(self._shard(job.shard))
                except BaseException as error:
                    job.file.set_exception(error)

    def _shard(self, shard: ShardRow) -> BinaryIO:
        name = f"{layout.SHARDS}/{shard.name}"
        return self._file(shard.sha256, shard.bytes, lambda path: self._fetcher.fetch_shard(name, path, shard))

    def _file(self, key: str, size: int | None, fill: Callable[[Path], None]) -> BinaryIO:
        if self._cache is not None:
            return self._cache.open(key, size, fill)
        with tempfile.NamedTemporaryFile(prefix="jigsaw-shard-") as file:
            path = Path(file.name)
            fill(path)
            # Without a name it goes when the last mapping of it does.
            return path.open("rb")


def _close_file(file: "Future[BinaryIO]") -> None:
    with contextlib.suppress(BaseException):
        file.result().close()
