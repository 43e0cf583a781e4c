"""Fetching whole files from a store that fails now and then: verified, and tried again with growing pauses.

A fetch is one GET into a local file. Tried again: answers 5xx, dropped connections, short bodies, silence beyond the
timeout, and content that is not what the manifest says. Not tried again: a missing file, a refused permission, a full
disk. Pauses grow from 0.25 to 20 s, each cut by up to half at random so that the processes of a run do not come back
together. Build it in the process that uses it. Costs a look at the file four times a second while it fetches.
"""

import asyncio
import concurrent.futures
import errno
import gc
import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec.config
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset.dataset import ShardRow
from jigsaw_pretrain.storage import Storage

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0
"""Seconds before the first retry, and the most before any."""

_HOPELESS = (FileNotFoundError, PermissionError, UserError, ImportError, TypeError, AttributeError, NotImplementedError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


_inherited: list[Any] = []


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


class BadShard(UserError):
    """A shard that is missing or whose bytes are wrong, however often it is fetched."""


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


def retrying(action: Callable[[], T], retries: int, what: str, verb: str = "read") -> T:
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
            raise UserError(f"{what} may not be {verb} ({_brief(error)}): check the credentials") from error
        except _HOPELESS:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            last = error
    if isinstance(last, WrongContent):
        raise last
    raise UserError(
        f"{what} cannot be {verb} after {retries + 1} attempts ({_brief(last)}): check the store and the network, then "
        "run the command again (pretrain: with --resume); --read-retries and --read-timeout allow for a worse one"
    ) from last


class Fetcher:
    """Fetches files below a URL. timeout: seconds of silence after which an attempt is given up."""

    def __init__(self, url: str, retries: int = 5, timeout: float = 30.0, connections: int = 16) -> None:
        self._storage = open_store(url, timeout, connections)
        self._retries, self._timeout = retries, timeout

    def fetch(self, name: str, path: Path, check: Callable[[Path], None]) -> None:
        """Write the file ``name`` whole to ``path``; ``check`` raises WrongContent where it is not as it should be."""

        def attempt() -> None:
            self._get(name, path)
            check(path)

        retrying(attempt, self._retries, self._storage.describe(name))

    def fetch_shard(self, name: str, path: Path, shard: ShardRow) -> None:
        """The same for a shard, verified by size and sha256; raises BadShard where that fails or it is missing."""
        try:
            self.fetch(name, path, lambda fetched: check_shard(fetched, shard))
        except (WrongContent, FileNotFoundError) as error:
            wrong = "is missing" if isinstance(error, FileNotFoundError) else str(error)
            raise BadShard(
                f"{self._storage.describe(name)} {wrong}: run `jigsaw-prep verify --repair`, prep the dataset again, "
                "or train without it by --on-bad-shard skip"
            ) from error

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


def check_shard(path: Path, shard: ShardRow) -> None:
    """Raise WrongContent where a file is not the shard of the manifest."""
    size = path.stat().st_size
    if size != shard.bytes:
        raise WrongContent(f"has {size:,} bytes where the manifest says {shard.bytes:,}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise WrongContent(f"has sha256 {found[:12]} where the manifest says {shard.sha256[:12]}")


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
