"""Where files lie: a folder of this machine or a prefix of an object store, through fsspec.

A file is published whole or not at all: locally as a temporary file that is synced and renamed, in a store as one put
of bytes that are complete. Nothing is ever written through an open remote stream, whose block publishes what it has
when an exception leaves it. Requests to a store are tried again (formats.retry); listings are never cached, and nothing
but hints is taken from them. Credentials and endpoints come from the drivers' own environment and configuration, and
are left out of all messages. Build a Storage in the process that uses it: drivers do not survive a fork.
"""

import contextlib
import datetime
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.litter import hold, sweep
from jigsaw_pretrain.formats.retry import TRIES, patiently, redacted

Answer = TypeVar("Answer")

CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 30.0
"""How long a web server may take to answer, and to go on, before the request is made again."""

_PUBLISH_TRIES = 5


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
        return action() if self.is_local else patiently(action, self.describe(name), self._tries)

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
                hold(file.fileno())
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
