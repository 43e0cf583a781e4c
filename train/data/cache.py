"""The host's cache of remote files: each fetched once, whole and verified, then shared by every rank and run.

A file lies under its content's key, so datasets that hold the same shard share it. Whoever lacks a file fills a
temporary one beside it under the key's lock and renames it, so a kill at any moment leaves the whole file or none; what
a killed process left is removed by the next one that makes room. Readers hold a shared lock on what they have mapped,
and only files on which an exclusive lock can be had are evicted, the one opened longest ago first. Opening a cached
file takes about 50 us; making room looks at every file of the folder (10,000 in 50 ms).

fsspec's own caches (simplecache, filecache) neither verify, share between processes nor evict by size; prefer them for
a few files of one process. The locks are flock(2): a folder on a local disk, or on an NFS that supports them.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage import sync_folder

_PART = ".part"


def default_folder() -> Path:
    """The cache in the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jigsaw-pretrain" / "shards"


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    used: float

    @property
    def is_part(self) -> bool:
        return self.path.name.endswith(_PART)


class Cache:
    """A folder of at most ``limit`` bytes (None: half of what the disk has free and the cache holds).

    More is held only where everything is in use. Safe among threads, processes and after a fork. Raises UserError for a
    folder that cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self._locks = folder / "locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            self.limit = (shutil.disk_usage(folder).free + self.held()) // 2 if limit is None else limit
        except OSError as error:
            raise UserError(f"cache {folder} cannot be used ({error.strerror}): name a folder with --cache") from error

    def held(self) -> int:
        """Bytes of all its files, those being filled included."""
        return sum(entry.size for entry in self._entries())

    def open(self, key: str, size: int | None, fill: Callable[[Path], None]) -> BinaryIO:
        """The file of a key, open for reading and safe from eviction until it and every mapping of it are closed.

        size: its bytes, where known. fill: writes the whole, verified content to a path (of a file that exists); called
        only where the cache lacks the key, by one process of the host at a time.
        """
        found = self._existing(key, size)
        if found is not None:
            return found
        with _locked(self._locks / f"{key[:3]}.lock"):
            # Another process may have filled it meanwhile.
            return self._existing(key, size) or self._filled(key, size, fill)

    def _existing(self, key: str, size: int | None) -> BinaryIO | None:
        try:
            descriptor = os.open(self.folder / key, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
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

    def _filled(self, key: str, size: int | None, fill: Callable[[Path], None]) -> BinaryIO:
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
        with _locked(self.folder / "room.lock"):
            entries = sorted(self._entries(), key=lambda entry: entry.used)
            held = sum(entry.size for entry in entries)
            for entry in entries:
                if (entry.is_part or held + size > self.limit) and _remove_unused(entry.path):
                    held -= entry.size
            part = self.folder / f".{key}.{size}.{secrets.token_hex(4)}{_PART}"
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return part, descriptor

    def _entries(self) -> Iterator[_Entry]:
        with os.scandir(self.folder) as found:
            for item in found:
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    if item.name.endswith(_PART):
                        yield _Entry(
                            Path(item.path), max(status.st_size, int(item.name.split(".")[-3])), status.st_mtime
                        )
                    elif item.is_file(follow_symlinks=False) and not item.name.endswith(".lock"):
                        yield _Entry(Path(item.path), status.st_size, status.st_mtime)


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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file exclusively, against threads and processes alike; a dead holder's lock is free."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # A process forked meanwhile holds the descriptor too: closing it here alone would not free the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
