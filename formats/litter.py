"""Temporary files that a killed process left behind: telling them from those being written, and removing them.

A writer holds an exclusive lock (flock) on its temporary file for as long as it writes; the system takes the lock away
when the process dies, on whatever machine of a shared file system. So what can be locked is litter. Where a file system
knows no locks, files untouched for an hour are. Object stores have none: a put is whole or did not happen.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

STALE_SECONDS = 3600.0

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that formats.storage.temporary_beside makes."""
    return _TEMPORARY.fullmatch(name) is not None


def hold(descriptor: int) -> None:
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
