"""Where files lie: a folder of this machine or a prefix of an object store, through fsspec.

A file is published whole or not at all: locally as a temporary file that is synced and renamed, in a store as one put
of bytes that are complete. Nothing is ever written through an open remote stream, whose block publishes what it has
when an exception leaves it. Requests to a store are tried again (formats.retry); listings are never cached, and nothing
but hints is taken from them. Credentials and endpoints come from the drivers' own environment and configuration, and
are left out of all messages. Build a Storage in the process that uses it: drivers do not survive a fork.

Asking again: requests to object stores fail now and then, and most failures pass.

Waits are exponential with full jitter, so that a thousand workers that failed together do not come back together.
Costs nothing where the first try succeeds; a store that is down costs about half a minute before it is said.

Temporary files that a killed process left behind: telling them from those being written, and removing them.

A writer holds an exclusive lock (flock) on its temporary file for as long as it writes; the system takes the lock away
when the process dies, on whatever machine of a shared file system. So what can be locked is litter. Where a file system
knows no locks, files untouched for an hour are. Object stores have none: a put is whole or did not happen.

Doing things ahead of their use: a function over a sequence by threads, results in order, few of them waiting.

For calls that wait (requests, disks); a thousand requests of 20 ms take a second or two. Work that computes goes to
processes (prep.executors).
"""

import asyncio
import concurrent.futures
import contextlib
import datetime
import errno
import gc
import os
import random
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import fsspec.config
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from jigsaw_pretrain.errors import UserError

Answer = TypeVar("Answer")

CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 30.0
"""How long a web server may take to answer, and to go on, before the request is made again."""

_PUBLISH_TRIES = 5

TRIES = 8
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0
"""Seconds: the first wait is drawn from 0 to FIRST_WAIT, each next one from a range twice as long."""

_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FINAL += (UserError, NotImplementedError, ImportError, MemoryError)  # type: ignore[assignment]
_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials", "ProfileNotFound")

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

STALE_SECONDS = 3600.0

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL_THREADS, REMOTE_THREADS = 4, 16
"""How many things are asked for at the same time: the latency of a store is hidden by width."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0
"""Seconds before the first retry, and the most before any."""

_HOPELESS = (FileNotFoundError, PermissionError, UserError, ImportError, TypeError, AttributeError, NotImplementedError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


_inherited: list[Any] = []


@dataclass(frozen=True)
class Entry:
    """A file of a listing: its name (last component), bytes, and when it was written (Unix time; None: not told)."""

    name: str
    bytes: int
    written: float | None


class Storage:
    """A root folder or prefix; ``name`` arguments are paths relative to it, with forward slashes.

    tries: how often a request to a store is made before its failure is raised.
    """

    def __init__(
        self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None, tries: int = TRIES
    ) -> None:
        self.url, self._tries = os.fspath(url), tries
        try:
            self.fs, root = url_to_fs(self.url, **_driver_options(self.url), **dict(options or {}))
        except (ImportError, ValueError) as error:
            scheme = self.url.split("://")[0]
            raise UserError(
                f"{redacted(self.url)}: no driver for {scheme}:// ({redacted(str(error))}). "
                "Install one: pip install 'jigsaw-pretrain[s3]' (or [gcs], [azure], [http])."
            ) from error
        self.root = root.rstrip("/") or "/"
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def _ask(self, action: Callable[[], Answer], name: str) -> Answer:
        return action() if self.is_local else with_retries(action, self.describe(name), self._tries)

    def local_path(self, name: str) -> Path:
        """The path of a file of a local root."""
        if not self.is_local:
            raise ValueError(f"{self.describe(name)} is not a local file")
        return Path(self._path(name))

    def describe(self, name: str) -> str:
        """``name`` with the root as the user gave it, for messages: without passwords and signatures."""
        return f"{redacted(self.url).rstrip('/')}/{name}" if name else redacted(self.url)

    def exists(self, name: str) -> bool:
        """Whether a file of that name has been published."""
        try:
            if self.url.startswith(("http://", "https://")):
                # The driver takes any failure of a web server's for a missing file, except when it reads.
                self.read_range(name, 0, 1)
            else:
                self._ask(lambda: self.fs.info(self._path(name)), name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def read(self, name: str) -> bytes:
        """The bytes of one file; raises FileNotFoundError."""
        return self._ask(lambda: bytes(self.fs.cat_file(self._path(name))), name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of one file from ``offset`` on; raises FileNotFoundError."""
        data = self._ask(lambda: bytes(self.fs.cat_file(self._path(name), start=offset, end=offset + size)), name)
        # Simple web servers do not know ranges and answer with the whole file.
        return data if len(data) <= size else data[offset : offset + size]

    def entries(self, folder: str) -> tuple[Entry, ...]:
        """The files and folders directly in ``folder``, sorted by name; a hint, as ``list`` is."""
        try:
            found = self._ask(lambda: self.fs.ls(self._path(folder), detail=True), folder)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        entries = (
            Entry(str(info["name"]).rstrip("/").rsplit("/", 1)[-1], int(info.get("size") or 0), _written(info))
            for info in found
        )
        return tuple(sorted(entries, key=lambda entry: entry.name))

    def find(self) -> tuple[str, ...]:
        """The paths of all files below the root, relative to it, sorted."""
        root = self.root.rstrip("/") + "/"
        found = self._ask(lambda: tuple(self.fs.find(self.root)), "")
        return tuple(sorted(str(path).removeprefix(root) for path in found))

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
            self._ask(lambda: self.fs.pipe_file(self._path(name), data), name)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self.fs.rm_file(self._path(name)), name)

    def sweep(self, *folders: str) -> None:
        """Remove what killed processes left in these folders; other processes' unfinished files stay."""
        for folder in folders if self.is_local else ():
            sweep(self.local_path(folder))


def publish_locally(final: Path, data: bytes) -> None:
    """Write a temporary file beside ``final``, sync and rename it; another's sweep may cost it a second try."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for turn in range(_PUBLISH_TRIES):
        temporary = temporary_beside(final)
        try:
            with temporary.open("xb") as file:
                _lock(file.fileno())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(final)
            break
        except FileNotFoundError:
            if turn + 1 == _PUBLISH_TRIES:
                raise
            final.parent.mkdir(parents=True, exist_ok=True)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    sync_folder(final.parent)


def temporary_beside(final: Path) -> Path:
    """A fresh name in the same folder (rename is atomic only within one file system)."""
    return final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _driver_options(url: str) -> dict[str, Any]:
    """What every driver is told: to list afresh each time, and not to wait for ever."""
    if "://" not in url or url.startswith(("file://", "local://")):
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("http://", "https://")):
        with contextlib.suppress(ImportError):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
    return options


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


class StoreError(OSError):
    """A request that failed for good, in words without credentials."""


def with_retries(action: Callable[[], Answer], what: str, tries: int = TRIES) -> Answer:
    """What ``action`` returns, tried up to ``tries`` times; ``what`` names the thing in messages.

    FileNotFoundError and the like are raised at once; StoreError after the last try; UserError without credentials.
    """
    for turn in range(tries):
        try:
            return action()
        except _FINAL:
            raise
        except Exception as error:
            name = type(error).__name__
            if any(word in name for word in _CREDENTIALS):
                raise UserError(
                    f"{redacted(what)}: the driver found no credentials ({name}). Give them in its usual way, such as "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
                ) from error
            if turn + 1 == tries or not is_transient(error):
                raise StoreError(f"{redacted(what)}: {name} {redacted(_first_words(error))}".rstrip()) from error
            time.sleep(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**turn)))
    raise AssertionError("unreachable")


def is_transient(error: Exception) -> bool:
    """Whether a failure may pass: all but those that say the request itself is wrong (4xx and the driver's own)."""
    if isinstance(error, ValueError | TypeError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))


def redacted(text: str) -> str:
    """A URL or a message without what follows a question mark (signatures) and without user names and passwords."""
    return re.sub(r"\?[^\s'\")>]+", "?...", re.sub(r"://[^/@\s]+@", "://", text))


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that formats.storage.temporary_beside makes."""
    return _TEMPORARY.fullmatch(name) is not None


def _lock(descriptor: int) -> None:
    """Lock a file that is being written until it is closed; does nothing where that is not known."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def sweep(folder: Path) -> int:
    """Remove the litter directly in ``folder``; returns how many files went. Those being written stay."""
    return sum(_remove_if_left(path) for path in _temporaries(folder))


def _temporaries(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (path for path in list(folder.iterdir()) if is_temporary(path.name))


def _remove_if_left(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        # A writer that has its file open but not yet locked loses it here, and publishes once more (formats.storage).
        if not _is_free(descriptor, path):
            return False
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_free(descriptor: int, path: Path) -> bool:
    """Whether nobody writes: the lock can be had, or, where there are no locks, the file is old by its own clock."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
    return _age(path) > STALE_SECONDS


def _age(path: Path) -> float:
    """Seconds since a file was touched, by the file system's clock: hosts' clocks may differ by hours."""
    probe = path.with_name(f".age.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
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


def _keep_inherited() -> None:
    """In a forked child, keep the parent's drivers from being finalised.

    A finaliser closes their connections by way of the parent's selector, which parent and child share, so the parent's
    next request would be heard of only when it times out.
    """
    classes = [AbstractFileSystem]
    for kind in classes:
        classes += kind.__subclasses__()
        _inherited.extend(getattr(kind, "_cache", {}).values())
    gc.freeze()


os.register_at_fork(after_in_child=_keep_inherited)


class WrongContent(Exception):
    """What was fetched is not what the manifest says; the message says how."""


def driver_options(url: str, timeout: float, connections: int) -> dict[str, Any]:
    """What a store's driver must be told so that a fetch is one GET and retries are ours alone: options by scheme."""
    if url.split("://")[0] not in ("s3", "s3a"):
        return {}
    own = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
    settings = {
        "connect_timeout": timeout,
        "read_timeout": timeout,
        "retries": {"max_attempts": 0},
        "max_pool_connections": connections,
    }
    # Its default is several ranged GETs for files above 50 MB.
    return {"config_kwargs": own | settings, "max_concurrency": 1}


def open_store(url: str, timeout: float, connections: int = 16) -> Storage:
    """The storage of a URL, told not to retry by itself, nor its driver where that can be told: callers do."""
    storage = Storage(url, driver_options(url, timeout, connections), tries=1)
    if not storage.is_local and hasattr(storage.fs, "retries"):
        storage.fs.retries = 1
    return storage


def pause_before(attempt: int) -> float:
    """Seconds to wait before retry ``attempt`` (from 1)."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.SystemRandom().uniform(0.5, 1.0)


def fetch_with_retries(action: Callable[[], Answer], retries: int, what: str, verb: str = "read") -> Answer:
    """The result of ``action``, tried again up to ``retries`` times.

    Raises UserError naming ``what`` where the store keeps failing or cannot be asked, WrongContent where its content
    keeps being wrong, FileNotFoundError where there is none.
    """
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(pause_before(attempt))
        try:
            return action()
        except PermissionError as error:
            raise UserError(f"{what} may not be {verb} ({_first_line(error)}): check the credentials") from error
        except _HOPELESS:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            last = error
    if isinstance(last, WrongContent):
        raise last
    raise UserError(
        f"{what} cannot be {verb} after {retries + 1} attempts ({_first_line(last)}): check the store and the network, "
        "then run the command again (pretrain: with --resume); --read-retries and --read-timeout allow for a worse one"
    ) from last


class Fetcher:
    """Fetches files below a URL. timeout: seconds of silence after which an attempt is given up."""

    def __init__(self, url: str, retries: int = 5, timeout: float = 30.0, connections: int = 16) -> None:
        self._storage = open_store(url, timeout, connections)
        self._retries, self._timeout = retries, timeout

    def describe(self, name: str) -> str:
        """A file's URL, without passwords."""
        return self._storage.describe(name)

    def fetch(self, name: str, path: Path, check: Callable[[Path], None]) -> None:
        """Write the file ``name`` whole to ``path``; ``check`` raises WrongContent where it is not as it should be."""

        def attempt() -> None:
            self._get(name, path)
            check(path)

        fetch_with_retries(attempt, self._retries, self._storage.describe(name))

    def _get(self, name: str, path: Path) -> None:
        fs, remote = self._storage.fs, f"{self._storage.root.rstrip('/')}/{name}"
        if not isinstance(fs, AsyncFileSystem):
            # Such drivers have their own timeouts.
            fs.get_file(remote, os.fspath(path))
            return
        running = asyncio.run_coroutine_threadsafe(fs._get_file(remote, os.fspath(path)), fs.loop)
        try:
            self._watch(running, path)
        finally:
            running.cancel()

    def _watch(self, running: "concurrent.futures.Future[Any]", path: Path) -> None:
        """Wait for a fetch as long as its file grows; raises TimeoutError where it has not for the timeout."""
        size, since = -1, time.monotonic()
        while True:
            try:
                running.result(timeout=min(0.25, self._timeout / 4))
                return
            except concurrent.futures.TimeoutError:
                if running.done():
                    raise
            now = path.stat().st_size
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                raise TimeoutError(f"no byte for {self._timeout:g} s")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
