"""Where files lie: a folder of this machine or a prefix of an object store, through fsspec.

A file is published whole or not at all: locally by files.py, in a store as one put of bytes that are complete.
Nothing is ever written through an open remote stream, whose block publishes what it has when an exception leaves it.
Listings are never cached, and nothing but hints is taken from them. Credentials and endpoints come from the drivers'
own environment and configuration, and are left out of all messages. Build a Storage in the process that uses it:
drivers do not survive a fork.

Requests are made again as retries.py says. Many small ones go through ``map_ahead``: a thousand of 20 ms take a second
or two. Work that computes goes to processes (prep/executors.py).
"""

import concurrent.futures
import contextlib
import datetime
import errno
import functools
import gc
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from jigsaw_pretrain.errors import UserError, redacted
from jigsaw_pretrain.storage.drivers import (
    CONNECTIONS,
    MOST_NAMES,
    EndlessListing,
    NoRanges,
    driver_options,
    is_s3,
    is_web,
    leave_retries,
    names_in_s3,
    part_of_s3_file,
    part_of_web_file,
)
from jigsaw_pretrain.storage.files import locked_folder, publish_locally, sweep
from jigsaw_pretrain.storage.retries import (
    OUT_OF_FILES,
    TRIES,
    Answer,
    StoreError,
    first_line,
    in_words,
    with_retries,
)

Item = TypeVar("Item")

Result = TypeVar("Result")

ANSWER_SECONDS, CONTENT_SECONDS = 12.0, 600.0
"""How long one request for a listing or a size may take in all, and one for content, whatever the driver."""

MOST_WHOLE_BYTES = 16 << 30
"""The most that a file may have which is read whole, where its reader states no less: an annotation file's."""

MOST_LINES_BYTES = 4 << 30
"""The most that a run's file of one line per step may have: twenty million rows."""

LOCAL_THREADS, REMOTE_THREADS = 4, CONNECTIONS
"""How many things are asked for at the same time: the latency of a store is hidden by width."""

_EMPTY = re.compile(r"\b416\b|InvalidRange|(?i:range is not (valid|satisfiable))")
"""What stores say of a range of an empty file."""


@dataclass(frozen=True)
class Entry:
    """A file of a listing: its name (last component), bytes, and when it was written (Unix time; None: not told)."""

    name: str
    bytes: int
    written: float | None


def location(where: str | os.PathLike[str], name: str) -> str:
    """A path or URL that a caller gave, as text; raises UserError, which calls it ``name``."""
    if isinstance(where, str):
        return where
    text = os.fspath(where) if isinstance(where, os.PathLike) else None
    if not isinstance(text, str):
        raise UserError(f"{name} must be a path or a URL, not {where!r}")
    if _URL_AS_PATH.match(text):
        raise UserError(f"{name}: pathlib has made {text} of a URL: give it as a string")
    return text


_URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
"""What is left of a URL in a path, which knows no two slashes in a row."""


class Storage:
    """A root folder or prefix; ``name`` arguments are paths relative to it, with forward slashes.

    tries: how often a request to a store is made before its failure is raised.
    """

    def __init__(
        self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None, tries: int = TRIES
    ) -> None:
        self.url, self._tries = os.fspath(url), tries
        try:
            self.fs, root = url_to_fs(self.url, **{**driver_options(self.url), **dict(options or {})})
        except (ImportError, ValueError) as error:
            scheme = self.url.split("://")[0]
            raise UserError(
                f"{redacted(self.url)}: no driver for {scheme}:// ({redacted(str(error))}). "
                "Install one: pip install 'jigsaw-pretrain[s3]' (or [gcs], [azure], [http])."
            ) from error
        except OSError as error:
            # Some connect at once.
            raise StoreError(f"{redacted(self.url)}: {redacted(first_line(error))}") from error
        except Exception as error:
            # Of drivers that need more than a URL, and of what their libraries raise.
            raise UserError(
                f"{redacted(self.url)} cannot be opened ({redacted(first_line(error))}): its driver takes no such "
                "URL. Name a folder, or a URL of s3://, gs://, az:// or https://."
            ) from error
        self.root = root.rstrip("/") or "/"
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if isinstance(self.fs, AsyncFileSystem):
            _watch_forks()
        leave_retries(self.fs)

    def full_path(self, name: str) -> str:
        """The driver's own path of a file."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def _ask(self, action: Callable[[], Answer], name: str) -> Answer:
        if not self.is_local:
            return with_retries(action, self.describe(name), self._tries)
        try:
            return action()
        except OSError as error:
            # Of the process, not of the file: nobody may call that damaged.
            if error.errno in OUT_OF_FILES and (known := in_words(error, self.describe(name))) is not None:
                raise known from error
            raise

    def _call(self, method: str, *arguments: Any, seconds: float = ANSWER_SECONDS, **named: Any) -> Any:
        """What a method of the driver returns; TimeoutError after so many seconds, of drivers that can be left."""
        if isinstance(self.fs, AsyncFileSystem):
            return self._sync(getattr(self.fs, f"_{method}"), *arguments, seconds=seconds, **named)
        return getattr(self.fs, method)(*arguments, **named)

    def _sync(self, asked: Callable[..., Any], *arguments: Any, seconds: float, **named: Any) -> Any:
        """What a driver's coroutine returns; TimeoutError after so many seconds."""
        try:
            return sync(self.fs.loop, asked, *arguments, timeout=seconds, **named)
        except FSTimeoutError as error:
            raise TimeoutError(f"no whole answer in {seconds:g} s") from error

    def local_path(self, name: str) -> Path:
        """The path of a file of a local root."""
        if not self.is_local:
            raise ValueError(f"{self.describe(name)} is not a local file")
        return Path(self.full_path(name))

    def regular_file(self, name: str, most: int | None = None) -> Path:
        """The path of a local file that can be read to its end: no folder, FIFO or device, and at most ``most`` bytes.

        Raises OSError.
        """
        path = self.local_path(name)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file but a FIFO, socket or device", str(path))
        if most is not None and status.st_size > most:
            raise _too_large(str(path), most)
        return path

    def describe(self, name: str) -> str:
        """``name`` with the root as the user gave it, for messages: without passwords and signatures."""
        return f"{redacted(self.url).rstrip('/')}/{name}" if name else redacted(self.url)

    def exists(self, name: str) -> bool:
        """Whether a file of that name has been published."""
        try:
            if is_web(self.url):
                # The driver takes any failure of a web server's for a missing file, except when it reads.
                self.read_range(name, 0, 1)
            else:
                self._ask(lambda: self._call("info", self.full_path(name)), name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def read(self, name: str, most: int = MOST_WHOLE_BYTES) -> bytes:
        """The bytes of one file, of which there may be at most ``most``; raises FileNotFoundError, OSError.

        Of a store no more than these are taken, whatever it sends.
        """
        if self.is_local:
            return self._ask(lambda: self.regular_file(name, most).read_bytes(), name)
        data = self._ask(lambda: self._range(name, 0, most + 1), name)
        if len(data) > most:
            raise _too_large(self.describe(name), most)
        return data

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of one file from ``offset`` on; raises FileNotFoundError, UserError where none is served."""
        part = self._part if self.is_local else self._range
        return self._ask(lambda: part(name, offset, size), name)

    def _range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file in a store, none behind its end."""
        path = self.full_path(name)
        try:
            if is_web(self.url) or is_s3(self.url):
                part = part_of_web_file if is_web(self.url) else part_of_s3_file
                return bytes(self._sync(part, self.fs, path, offset, size, seconds=CONTENT_SECONDS))
            where = {"start": offset, "end": offset + size}
            return bytes(self._call("cat_file", path, seconds=CONTENT_SECONDS, **where))
        except NoRanges as error:
            raise UserError(
                f"{self.describe(name)}: that web server does not serve parts of files. Copy the file first."
            ) from error
        except Exception as error:
            if offset == 0 and _EMPTY.search(f"{getattr(error, 'status', '')} {type(error).__name__} {error}"):
                return b""
            raise

    def _part(self, name: str, offset: int, size: int) -> bytes:
        with self.regular_file(name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def entries(self, folder: str) -> tuple[Entry, ...]:
        """The files and folders directly in ``folder``, sorted by name; a hint, as ``list`` is."""
        try:
            found = self._ask(lambda: self._call("ls", self.full_path(folder), detail=True), folder)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        entries = (
            Entry(str(info["name"]).rstrip("/").rsplit("/", 1)[-1], int(info.get("size") or 0), _written(info))
            for info in found
        )
        return tuple(sorted(entries, key=lambda entry: entry.name))

    def find(self, seconds: float = CONTENT_SECONDS, most: int = MOST_NAMES) -> tuple[str, ...]:
        """The paths of all files below the root, relative to it, sorted, as ``survey`` gives them."""
        return self.survey(seconds, most)[0]

    def survey(
        self, seconds: float = CONTENT_SECONDS, most: int = MOST_NAMES
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The paths of all files below the root, and links to folders that are not followed, each sorted.

        Raises TimeoutError where a store needs more than so many seconds, UserError for more than ``most`` files in S3.

        Links to folders are followed within the root; those that lead out of it, or back to a folder that holds them,
        are not.
        """
        if self.is_local:
            return _walk(Path(self.root))
        return tuple(sorted(self._ask(lambda: self._names(seconds, most), ""))), ()

    def _names(self, seconds: float, most: int) -> list[str]:
        """``survey`` of a store, in the driver's order."""
        if is_s3(self.url):
            try:
                found: list[str] = self._sync(names_in_s3, self.fs, self.root, most, seconds=seconds)
                return found
            except EndlessListing as error:
                raise UserError(f"{self.describe('')}: {error}") from error
        root = self.root.rstrip("/") + "/"
        return [str(path).removeprefix(root) for path in self._call("find", self.root, seconds=seconds)]

    def list(self, folder: str) -> list[str]:
        """Names (last component) of the files directly in ``folder``, sorted; none where there is no such folder.

        Object stores may list late: treat the answer as a hint, never as proof that something is missing.
        """
        return [entry.name for entry in self.entries(folder)]

    def publish(self, name: str, data: bytes) -> None:
        """Make ``data`` appear under ``name``, whole or not at all, replacing what was there."""
        if self.is_local:
            publish_locally(self.local_path(name), data)
        else:
            self._ask(lambda: self._call("pipe_file", self.full_path(name), data, seconds=CONTENT_SECONDS), name)

    def size(self, name: str) -> int | None:
        """The bytes of a file; None where there is none."""
        try:
            return int(self._ask(lambda: self._call("info", self.full_path(name)), name)["size"])
        except (FileNotFoundError, NotADirectoryError, TypeError):
            return None

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._call("rm_file", self.full_path(name)), name)

    @contextlib.contextmanager
    def locked(self, exclusive: bool) -> Iterator[Callable[[], None]]:
        """Hold a lock on a local root, exclusively or shared with others; gives what makes an exclusive one shared.

        Leaves no file. Does nothing for a store, nor where the file system knows no locks. Raises UserError where
        others keep it for LOCK_SECONDS.
        """
        if not self.is_local:
            yield lambda: None
            return
        with locked_folder(self.local_path(""), exclusive, self.describe("")) as share:
            yield share

    def sweep(self, *folders: str) -> None:
        """Remove what killed processes left in these folders; other processes' unfinished files stay."""
        # Object stores have none: a put is whole or did not happen.
        for folder in folders if self.is_local else ():
            sweep(self.local_path(folder))


def _too_large(where: str, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has more than the {most:,} bytes that such a file may have", where)


def _walk(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``survey`` of a local folder."""
    files: list[str] = []
    refused: list[str] = []
    within = os.path.realpath(root)
    folders = [("", within)]
    while folders:
        before, real = folders.pop()
        try:
            entries = list(os.scandir(root / before))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            name = before + entry.name
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False  # a link to itself, which whoever reads it reports
            if not is_folder:
                files.append(name)
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else f"{real.rstrip('/')}/{entry.name}"
            leaves = os.path.commonpath([within, target]) != within
            if entry.is_symlink() and (leaves or os.path.commonpath([real, target]) == target):
                refused.append(name)
            else:
                folders.append((f"{name}/", target))
    return tuple(sorted(files)), tuple(sorted(refused))


def _written(info: Mapping[str, Any]) -> float | None:
    """When a file was written, by whichever name the driver gives it."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    return None


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Map a function over items with threads; results in order, at most twice ``threads`` computed ahead.

    Raises what the function raises for an item, and begins no further one: each would wait for a silent store in vain.
    """
    coming, failed = iter(items), threading.Event()

    def one(item: Item) -> Result:
        if failed.is_set():
            raise concurrent.futures.CancelledError
        try:
            return function(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(one, item) for item in islice(coming, 2 * threads))
        try:
            while waiting:
                result = waiting.popleft().result()
                for item in islice(coming, 1):
                    waiting.append(pool.submit(one, item))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def open_store(url: str, timeout: float, connections: int = REMOTE_THREADS, **options: Any) -> Storage:
    """The storage of a URL, told not to retry by itself, nor its driver where that can be told: callers do."""
    return Storage(url, {**driver_options(url, timeout, timeout, connections), **options}, tries=1)


_held: list[Any] = []


def _hold_drivers() -> None:
    """Before a fork, hold all drivers: fsspec drops its own hold on them in the child, before anything else runs there.

    A driver that the child finalised would close its connections by way of its parent's selector, which both share, so
    that the parent's next request would be heard of only when it times out.
    """
    classes = [AbstractFileSystem]
    for kind in classes:
        classes += kind.__subclasses__()
        _held.extend(getattr(kind, "_cache", {}).values())


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(before=_hold_drivers, after_in_parent=_held.clear, after_in_child=gc.freeze)
