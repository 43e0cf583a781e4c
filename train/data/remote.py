"""Fetches shards of an object store ahead of their use, and keeps them as local files in a cache of the host.

Fetching: each lane's stream says which shard it draws from next; four threads per group fetch them, so the three groups
come in parallel and a slow one holds up no other. A fetch is mostly waiting, so that more threads cost little: 7 ms of
CPU time in 35 for a shard of 130 KB. What a lane waits for goes first, then what lanes begin with, then what they
draw from next. A fetched file is held (and so kept in the cache) until its lane takes it. Build it in the process that
reads; its threads end with the process whatever they are doing.

The cache: each file is fetched once, whole and verified, then shared by every rank and run. It lies under its content's
key, so datasets that hold the same shard share it. Whoever lacks a file fills a temporary one beside it under the key's
lock and renames it, so a kill at any moment leaves the whole file or none; what a killed process left is removed by the
next one that makes room. The files lie in a subfolder of the folder that is named, and only what the cache itself could
have put there is ever removed. Readers hold a shared lock on what they have open, and only files on which an exclusive
lock can be had are evicted, the one opened longest ago first. Opening a cached file takes about 50 us; making room
looks at every file of the folder (10,000 in 50 ms). The locks are flock(2): a folder on a local disk, or on an NFS that
supports them.

Prefer fsspec's own caches (simplecache, filecache) for a few files of one process: they neither verify, share between
processes nor evict by size.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
from filelock import FileLock
from msgspec import UNSET, Meta

from jigsaw_pretrain.config import CountOrZero, Positive, checked
from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.formats.dataset import layout
from jigsaw_pretrain.formats.dataset.dataset import Dataset, ShardRow, open_dataset
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.storage.drivers import driver_options
from jigsaw_pretrain.storage.fetcher import Fetcher
from jigsaw_pretrain.storage.files import sync_folder
from jigsaw_pretrain.storage.retries import WrongContent, fetch_with_retries
from jigsaw_pretrain.storage.store import Storage, open_store

_FOLDER = "jigsaw-shards"
_KEY = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = "jigsaw-shard-"
_LEFTOVER_AGE = 60.0
"""Seconds."""

_PART = re.compile(r"\.[0-9a-f]{64}\.(\d{1,15})\.[0-9a-f]{8}\.part")

BAD_SHARD = ("stop", "skip")

AHEAD = 1
"""Units fetched ahead of each stream."""

THREADS_PER_GROUP = 4

NOW, FIRST, NEXT = range(3)
"""How urgent a shard is: a lane waits for it, a lane begins with it, a lane draws from it next."""


class BadShard(UserError):
    """A shard that is missing or whose bytes are wrong, however often it is fetched."""


def check_shard(path: Path, shard: ShardRow) -> None:
    """Raise WrongContent where a file is not the shard of the manifest."""
    size = path.stat().st_size
    if size != shard.bytes:
        raise WrongContent(f"has {size:,} bytes where the manifest says {shard.bytes:,}")
    with path.open("rb") as file:
        _check_sha256(file, shard.sha256)


def _check_sha256(file: BufferedReader, expected: str) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    if found != expected:
        raise WrongContent(f"has sha256 {found[:12]} where the manifest says {expected[:12]}")


def fetch_shard(fetcher: Fetcher, name: str, path: Path, shard: ShardRow) -> None:
    """Fetch a shard to ``path``, verified by size and sha256; raises BadShard where that fails or it is missing."""
    try:
        fetcher.fetch(name, path, lambda fetched: check_shard(fetched, shard), shard.bytes)
    except (WrongContent, FileNotFoundError) as error:
        wrong = "is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise BadShard(
            f"{fetcher.describe(name)} {wrong}: run `jigsaw-prep verify --repair`, prep the dataset again, "
            "or train without it by --on-bad-shard skip"
        ) from error


def default_cache() -> Path:
    """The cache in the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "jigsaw-pretrain" / "shards"
    try:
        return Path.home() / ".cache" / "jigsaw-pretrain" / "shards"
    except RuntimeError:
        # A container's user without HOME and without an entry in passwd.
        return Path(tempfile.gettempdir()) / f"jigsaw-pretrain-{os.getuid()}" / "shards"


@dataclass(frozen=True)
class _CacheEntry:
    path: Path
    size: int
    used: float
    is_part: bool


class ShardCache:
    """Files below ``folder`` of at most ``limit`` bytes (None: half of what the disk has free and the cache holds).

    More is held only where everything is in use. Safe among threads, processes and after a fork. Raises UserError for a
    folder that cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder / _FOLDER
        self._locks = self.folder / "locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            self.limit = (shutil.disk_usage(self.folder).free + self.held()) // 2 if limit is None else limit
        except OSError as error:
            raise UserError(f"cache {folder} cannot be used ({error.strerror}): name a folder with --cache") from error

    def held(self) -> int:
        """Bytes of all its files, those being filled included."""
        return sum(entry.size for entry in self._entries())

    def open(self, key: str, size: int | None, fill: Callable[[Path], None]) -> BufferedReader:
        """The file of a key, open for reading and safe from eviction until it and every mapping of it are closed.

        size: its bytes, where known. fill: writes the whole, verified content to a path (of a file that exists); called
        only where the cache lacks the key, by one process of the host at a time.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a cache: it is not 64 hexadecimal digits")
        found = self._existing(key, size)
        if found is not None:
            return found
        with _lock(self._locks / f"{key[:3]}.lock"):
            # Another process may have filled it meanwhile.
            return self._existing(key, size) or self._filled(key, size, fill)

    def _existing(self, key: str, size: int | None) -> BufferedReader | None:
        try:
            # What is no file must neither be waited for nor followed.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
            descriptor = os.open(self.folder / key, flags)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{self.folder / key} is not a file that the cache made: remove it")
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink and size is not None and status.st_size != size:
                # Not what was published: a disk that lost its end.
                (self.folder / key).unlink(missing_ok=True)
            elif status.st_nlink:
                os.utime(descriptor)
                return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def discard(self, key: str) -> None:
        """Forget a file whose content is not what it was when it was verified."""
        (self.folder / key).unlink(missing_ok=True)

    def _filled(self, key: str, size: int | None, fill: Callable[[Path], None]) -> BufferedReader:
        part, descriptor = self._make_room(key, size or 0)
        try:
            fill(part)
            os.fsync(descriptor)
            part.rename(self.folder / key)
            sync_folder(self.folder)
            # From here on it is a reader like any other.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return os.fdopen(descriptor, "rb")
        except BaseException as error:
            os.close(descriptor)
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"cache {self.folder}: the disk is full: make room, lower --cache-bytes or name another --cache"
                ) from error
            raise

    def _make_room(self, key: str, size: int) -> tuple[Path, int]:
        """Evict until ``size`` bytes fit; a temporary file that counts as so many, locked, and its descriptor."""
        with _lock(self.folder / "room.lock"):
            entries = sorted(self._entries(), key=lambda entry: entry.used)
            held = sum(entry.size for entry in entries)
            for entry in entries:
                if (entry.is_part or held + size > self.limit) and _remove_unused(entry.path):
                    held -= entry.size
            part = self.folder / f".{key}.{size}.{secrets.token_hex(4)}.part"
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return part, descriptor

    def _entries(self) -> Iterator[_CacheEntry]:
        with os.scandir(self.folder) as found:
            for item in found:
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    part = _PART.fullmatch(item.name)
                    if stat.S_ISREG(status.st_mode) and (part or _KEY.fullmatch(item.name)):
                        size = max(status.st_size, int(part[1])) if part else status.st_size
                        yield _CacheEntry(Path(item.path), size, status.st_mtime, part is not None)


def _remove_unused(path: Path) -> bool:
    """Remove a file that nobody reads or fills."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _lock(path: Path) -> FileLock:
    """A lock to hold exclusively, against threads and processes alike; a dead holder's lock is free."""
    return FileLock(path, poll_interval=0.005, mode=0o644)


_Bytes = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading shards.

    cache: the cache's folder; None for none. cache_bytes: the most it may hold; None for half of what the disk has free
    and it holds. read_retries: further attempts at a file. read_timeout: seconds of silence that end an attempt.
    on_bad_shard: ``stop``, or ``skip`` to go on without a shard whose bytes are wrong.
    """

    cache: Path | None = field(default_factory=default_cache)
    cache_bytes: int | None = None
    read_retries: int = 5
    read_timeout: float = 30.0
    on_bad_shard: str = "stop"

    def __post_init__(self) -> None:
        """Refuse what is neither stop nor skip, and numbers that are no counts and no seconds."""
        checked(self.cache_bytes, _Bytes | None, "cache_bytes")
        checked(self.read_retries, CountOrZero, "read_retries")
        checked(self.read_timeout, Positive, "read_timeout")
        if self.on_bad_shard not in BAD_SHARD:
            raise UserError(f"on-bad-shard {self.on_bad_shard!r} is not one of {', '.join(BAD_SHARD)}")

    def open_dataset(self, url: str) -> Dataset:
        """formats.dataset.dataset.open_dataset, tried again where the store fails."""
        options = driver_options(url, self.read_timeout, self.read_timeout)
        open_store(url, self.read_timeout)
        return fetch_with_retries(
            lambda: open_dataset(url, options, tries=1), self.read_retries, f"{redacted(url).rstrip('/')}/manifests"
        )


def working_set(dataset: Dataset, lanes: int) -> int:
    """The most bytes of shards that ``lanes`` lanes hold at a time: those open and those fetched ahead."""
    total = 0
    for group in GROUPS:
        sizes = sorted((shard.bytes for shard in dataset.of_group(group)), reverse=True)
        total += sum(sizes[: lanes * (1 + AHEAD)])
    return total


def check_cache(dataset: Dataset, access: ReadOptions, lanes_of_rank: int) -> None:
    """Refuse a cache that this host's lanes would overrun; raises UserError with the figure that would do."""
    if access.cache is None or Storage(dataset.url).is_local:
        return
    lanes = lanes_of_rank * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, limit = working_set(dataset, lanes), ShardCache(access.cache, access.cache_bytes).limit
    if limit < needed:
        reason = "--cache-bytes" if access.cache_bytes else "half of what the disk has free and it holds"
        raise UserError(
            f"cache {access.cache} may hold {limit:,} bytes ({reason}), but the {lanes} lanes of this host keep up to "
            f"{needed:,} bytes of shards open or on their way: give it --cache-bytes {needed} on a disk with that much "
            "room (--cache), begin the run with fewer lanes, or use --no-cache"
        )


@dataclass
class _Request:
    """A shard to be fetched once, by whichever thread claims it first."""

    shard: ShardRow
    file: "Future[BufferedReader]" = field(default_factory=Future)
    claim: threading.Lock = field(default_factory=threading.Lock)


class RemoteShards:
    """The shards of a dataset at a URL; a data.reader.ShardFiles. Used by one thread."""

    def __init__(self, dataset: Dataset, access: ReadOptions) -> None:
        self._dataset = dataset
        connections = THREADS_PER_GROUP * len(GROUPS) + 1
        self._fetcher = Fetcher(dataset.url, access.read_retries, access.read_timeout, connections)
        self._cache = None if access.cache is None else ShardCache(access.cache, access.cache_bytes)
        if self._cache is None:
            _remove_leftovers(Path(tempfile.gettempdir()))
        self._jobs: dict[int, _Request] = {}
        self._queues: dict[str, queue.PriorityQueue[tuple[int, int, _Request | None]]] = {}
        self._asked = 0

    def index(self) -> BufferedReader:
        """crops.parquet, open for reading: fetched whole, once per host; raises UserError where it is damaged."""
        # Where no manifest has its hash, what is cached belongs to exactly this dataset.json and shards.parquet.
        key = hashlib.sha256(f"{self._dataset.fingerprint} {layout.CROPS}".encode()).hexdigest()

        def check(path: Path) -> None:
            with path.open("rb") as file:
                self._check_index(file)

        def fill(path: Path) -> None:
            self._fetcher.fetch(layout.CROPS, path, check, self._dataset.most_index_bytes)

        try:
            file = self._file(key, None, fill)
            if self._cache is not None:
                try:
                    self._check_index(file)
                except WrongContent:
                    file.close()
                    self._cache.discard(key)
                    file = self._file(key, None, fill)
            return file
        except (WrongContent, FileNotFoundError) as error:
            raise UserError(
                f"{self._fetcher.describe(layout.CROPS)} cannot be used ({error}): run `jigsaw-prep verify --repair`, "
                "or prep the dataset again"
            ) from error

    def _check_index(self, file: BufferedReader) -> None:
        """Raise WrongContent where a file, which is left at its begin, is not the dataset's crops.parquet."""
        shards, digest = len(self._dataset.shards), self._dataset.description.crops_sha256
        size, most = os.fstat(file.fileno()).st_size, self._dataset.most_index_bytes
        if size > most:
            raise WrongContent(f"has {size:,} bytes, and no more than {most:,} belong to so many crops")
        if digest is not UNSET:
            _check_sha256(file, digest)
        try:
            found = pq.ParquetFile(file).metadata.num_row_groups
        except (OSError, ValueError) as error:
            raise WrongContent(f"is damaged ({error})") from error
        file.seek(0)
        if found != shards:
            raise WrongContent(f"has {found} row groups for {shards} shards")

    def ask(self, shard: ShardRow, urgency: int) -> None:
        """Fetch a shard ahead of time; asking again may make it more urgent."""
        if shard.index not in self._jobs:
            self._jobs[shard.index] = _Request(shard)
        self._enqueue(self._jobs[shard.index], urgency)

    def open(self, shard: ShardRow) -> BufferedReader:
        """The shard's file, once it is here; the caller closes it. Raises BadShard, UserError."""
        job = self._jobs.get(shard.index) or _Request(shard)
        self._enqueue(job, NOW)
        try:
            return job.file.result()
        finally:
            self._jobs.pop(shard.index, None)

    def close(self) -> None:
        """Stop the threads after their current fetch, and drop what was fetched ahead."""
        for waiting in self._queues.values():
            for _ in range(THREADS_PER_GROUP):
                waiting.put((-1, 0, None))
        for job in self._jobs.values():
            if not job.claim.acquire(blocking=False):
                job.file.add_done_callback(_close_file)
        self._jobs.clear()

    def _enqueue(self, job: _Request, urgency: int) -> None:
        group = job.shard.group
        if group not in self._queues:
            self._queues[group] = queue.PriorityQueue()
            for _ in range(THREADS_PER_GROUP):
                threading.Thread(target=self._work, args=(self._queues[group],), daemon=True).start()
        self._asked += 1
        self._queues[group].put((urgency, self._asked, job))

    def _work(self, waiting: "queue.PriorityQueue[tuple[int, int, _Request | None]]") -> None:
        while (job := waiting.get()[2]) is not None:
            if job.claim.acquire(blocking=False):
                try:
                    job.file.set_result(self._shard(job.shard))
                except BaseException as error:
                    job.file.set_exception(error)

    def _shard(self, shard: ShardRow) -> BufferedReader:
        name = f"{layout.SHARDS}/{shard.name}"
        return self._file(shard.sha256, shard.bytes, lambda path: fetch_shard(self._fetcher, name, path, shard))

    def _file(self, key: str, size: int | None, fill: Callable[[Path], None]) -> BufferedReader:
        if self._cache is not None:
            return self._cache.open(key, size, fill)
        with tempfile.NamedTemporaryFile(prefix=_TEMPORARY) as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            path = Path(file.name)
            fill(path)
            # Without a name it goes once it is closed.
            return path.open("rb")


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes of this user were filling."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        # Another process may remove or finish it at any moment.
        with contextlib.suppress(OSError):
            status = path.lstat()
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            # A younger one may be of a process that has yet to lock it.
            if ours and time.time() - status.st_mtime > _LEFTOVER_AGE:
                _remove_unused(path)


def _close_file(file: "Future[BufferedReader]") -> None:
    with contextlib.suppress(BaseException):
        file.result().close()
