"""Fetches files of a store whole into files of this machine, for training, which a store's bad minutes must not end.

Each is watched for growth rather than for its end, checked by its reader before it counts, and asked for again as
retries.py says, of a new driver where one hung. Costs nothing beside the driver's own fetch. Prefer Storage.read for
what is small.
"""

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.asyn import AsyncFileSystem

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage.drivers import LEAST_RATE
from jigsaw_pretrain.storage.retries import TooLong, fetch_with_retries
from jigsaw_pretrain.storage.store import Storage, open_store

_PIECE = 1 << 20


class Fetcher:
    """Fetches files below a URL. timeout: seconds of silence after which an attempt is given up.

    What follows a silent attempt is asked of a new driver: one whose event loop or connections hang is silent for ever.
    """

    def __init__(self, url: str, retries: int = 5, timeout: float = 30.0, connections: int = 16) -> None:
        self._storage = open_store(url, timeout, connections)
        self._retries, self._timeout, self._connections = retries, timeout, connections
        self._own_loop: asyncio.AbstractEventLoop | None = None

    def describe(self, name: str) -> str:
        """A file's URL, without passwords."""
        return self._storage.describe(name)

    def fetch(self, name: str, path: Path, check: Callable[[Path], None], most: int) -> None:
        """Write the file ``name`` whole to ``path``; ``check`` raises WrongContent where it is not as it should be.

        Raises TooLong for more than ``most`` bytes.
        """

        def attempt() -> None:
            storage = self._storage
            try:
                self._get(storage, name, path, most)
                check(path)
            except TimeoutError:
                if isinstance(storage.fs, AsyncFileSystem) and storage is self._storage:
                    self._renew(storage.url)
                raise
            except OSError as error:
                # What this machine's disk says is no fault of the store's.
                if error.filename is not None and Path(str(error.filename)) == path:
                    raise UserError(f"{path}: {error.strerror or error} (a file of this machine)") from error
                raise

        fetch_with_retries(attempt, self._retries, self._storage.describe(name))

    def _renew(self, url: str) -> None:
        """Take a driver with an event loop of its own from now on."""
        before, loop = self._own_loop, asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="own-loop", daemon=True).start()
        self._storage = open_store(url, self._timeout, self._connections, loop=loop, skip_instance_cache=True)
        self._own_loop = loop
        if before is not None:
            before.call_soon_threadsafe(before.stop)

    def _get(self, storage: Storage, name: str, path: Path, most: int) -> None:
        fs, remote = storage.fs, storage.full_path(name)
        if not isinstance(fs, AsyncFileSystem):
            # Such drivers have their own timeouts.
            if storage.is_local:
                storage.regular_file(name)
            with fs.open(remote, "rb") as source, path.open("wb") as file:
                # By pieces: what a server sends is a stranger's, and may have no end.
                while (piece := source.read(_PIECE)) and file.tell() <= most:
                    file.write(piece)
            _check_length(path, most)
            return
        # Watched for growth from the start: a driver makes the file with its first byte, and that may be slow to come.
        path.touch()
        running = asyncio.run_coroutine_threadsafe(fs._get_file(remote, os.fspath(path)), fs.loop)
        try:
            self._watch(running, path, most)
        finally:
            running.cancel()

    def _watch(self, running: "concurrent.futures.Future[Any]", path: Path, most: int) -> None:
        """Wait for a fetch as long as its file grows; raises TimeoutError where it has not for the timeout, TooLong."""
        size, since = -1, time.monotonic()
        while True:
            try:
                running.result(timeout=min(0.25, self._timeout / 4))
                _check_length(path, most)
                return
            except concurrent.futures.TimeoutError:
                if running.done():
                    raise
            now = _check_length(path, most)
            # A server that sends a byte a second is as good as silent.
            if now - max(size, 0) >= LEAST_RATE * self._timeout or size < 0:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                raise TimeoutError(f"fewer than {LEAST_RATE * self._timeout:,.0f} bytes in {self._timeout:g} s")


def _check_length(path: Path, most: int) -> int:
    """The bytes of a file that is being fetched; raises TooLong."""
    size = path.stat().st_size
    if size > most:
        raise TooLong(f"has more than the {most:,} bytes that such a file may have")
    return size
