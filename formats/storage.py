"""Where files lie: a folder of this machine or a prefix of an object store, through fsspec.

A file is published whole or not at all: locally as a temporary file that is synced and renamed, in a store as one put
of bytes that are complete. Nothing is ever written through an open remote stream, whose block publishes what it has
when an exception leaves it. Credentials and endpoints come from the drivers' own environment and configuration.
Build a Storage in the process that uses it: drivers with an event loop do not survive a fork.
"""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from formats.errors import UserError


class Storage:
    """A root folder or prefix; ``name`` arguments are paths relative to it, with forward slashes."""

    def __init__(self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
        try:
            self.fs, root = url_to_fs(self.url, **dict(options or {}))
        except (ImportError, ValueError) as error:
            scheme = self.url.split("://")[0]
            raise UserError(
                f"{self.url}: no driver for {scheme}:// ({error}). "
                "Install one: pip install 'jigsaw-pretrain[s3]' (or [gcs], [azure])."
            ) from error
        self.root = root.rstrip("/") or "/"
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def local_path(self, name: str) -> Path:
        """The path of a file of a local root."""
        if not self.is_local:
            raise ValueError(f"{self.describe(name)} is not a local file")
        return Path(self._path(name))

    def describe(self, name: str) -> str:
        """``name`` with the root as the user gave it, for messages."""
        return f"{self.url.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file of that name has been published."""
        return bool(self.fs.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        """The bytes of one file; raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self._path(name)))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of one file from ``offset`` on; raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self._path(name), start=offset, end=offset + size))

    def list(self, folder: str) -> list[str]:
        """Names (last component) of the files directly in ``folder``, sorted; none where there is no such folder.

        Object stores may list late: treat the answer as a hint, never as proof that something is missing.
        """
        try:
            found = self.fs.ls(self._path(folder), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except TypeError:
            found = self.fs.ls(self._path(folder), detail=False)
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def publish(self, name: str, data: bytes) -> None:
        """Make ``data`` appear under ``name``, whole or not at all, replacing what was there."""
        if not self.is_local:
            self.fs.pipe_file(self._path(name), data)
            return
        final = self.local_path(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(final)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(final.parent)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))


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
