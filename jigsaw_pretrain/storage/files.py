"""Files of this machine: written whole or not at all, locked while they are written, and named only below their folder.

A file is a temporary one in the same folder until it is complete, then it is synced and renamed, so a reader never sees
half of one and a process that was killed leaves nothing but a temporary file, which ``sweep`` removes. Costs two syncs
per file, which a disk takes milliseconds for; for what may be lost use plain files.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from jigsaw_pretrain.errors import UserError, redacted

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

PUBLISH_TRIES = 5
"""How often a local file is written again after a sweep took its temporary file away."""

STALE_SECONDS = 3600.0
"""Age of a temporary file that a dead process left, where the file system knows no locks."""

LOCK_SECONDS = 3.0
"""How long another's lock on a dataset's folder is waited for."""

RUN_LOCK_SECONDS = 10.0
"""How long the end of another process that writes to the same run is waited for: it may be saving its last step."""

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def inside(root: Path, name: str) -> Path:
    """The path of ``name`` below ``root``, for names that come from elsewhere; raises UserError for any that leads out.

    A name is relative, with forward slashes, and each of its parts is one: neither empty nor ``.`` or ``..``.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or set(name) & {"\\", "\0", ":"}:
        raise UserError(
            f"{redacted(name)[:200]!r} is no name of a file below {redacted(str(root))}: it leads elsewhere"
        )
    return root.joinpath(*parts)


def check_own_folders(root: Path, names: Iterable[str]) -> None:
    """Raise UserError where a folder below ``root`` that is written to is a link: it would be written outside.

    The root itself may be one, as it was named by the user; what lies in it may come from somebody else.
    """
    for path in (root / name for name in names):
        if path.is_symlink():
            raise UserError(
                f"{path} is a link, and nothing is written outside of {root}: move the folder back here, or make the "
                f"whole of {root} the link"
            )


def is_taken(path: Path) -> bool:
    """Whether something lies there that writing would lose; an empty file, as mktemp makes it, is nothing."""
    if path.is_symlink():
        return True
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


def holds(path: Path, content: bytes) -> bool:
    """Whether a file has exactly these bytes."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


@contextlib.contextmanager
def atomic_write(final: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under ``final`` whole or not at all, and durably, replacing what was there.

    It is a temporary file in the same folder, locked while it is written, then synced and renamed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(final)
    try:
        with temporary.open("xb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            # A write that fails (a full disk) does not say of which file, and nobody asked for a temporary one.
            error.filename = str(final)
        raise
    sync_folder(final.parent)


def publish_locally(final: Path, data: bytes) -> None:
    """``atomic_write`` of bytes; a sweep that took the temporary file away costs another try."""
    for attempt in range(PUBLISH_TRIES):
        try:
            with atomic_write(final) as file:
                file.write(data)
            return
        except FileNotFoundError:
            if attempt + 1 == PUBLISH_TRIES:
                raise


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


def sweep(folder: Path) -> int:
    """Remove the temporary files that dead processes left in ``folder``; returns how many.

    A writer holds a lock (flock) on its temporary file; the system takes the lock away when the process dies, on
    whatever machine of a shared file system. A temporary file that nobody has locked was left by a dead process. Where
    the file system knows no locks, files that nobody touched for an hour count as left.
    """
    try:
        left = [path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
    except OSError:
        return 0
    return sum(_remove_if_left(path) for path in left)


def _lock(descriptor: int) -> None:
    """Lock a file that is being written until it is closed; does nothing where locks are not known."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextlib.contextmanager
def locked_folder(folder: Path, exclusive: bool, where: str) -> Iterator[Callable[[], None]]:
    """Hold a lock on a folder, which is made; gives what makes an exclusive one shared. ``where`` is for messages.

    Leaves no file. Does nothing where locks are not known. Raises UserError where others keep it for LOCK_SECONDS.
    """
    if fcntl is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock_within(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, where)
        yield lambda: _lock_within(descriptor, fcntl.LOCK_SH, where)
    finally:
        os.close(descriptor)


def lock_file(path: Path, busy: str) -> FileLock | None:
    """An exclusive lock on an empty file, which stays: until ``release()`` or the end of this process.

    None where the file system knows no locks. Raises UserError, ``busy``, where another process keeps it for
    RUN_LOCK_SECONDS, and OSError.
    """
    lock = FileLock(path, mode=0o644)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: waiting up to %g s for its end", busy, RUN_LOCK_SECONDS)
            lock.acquire(timeout=RUN_LOCK_SECONDS)
    except Timeout as error:
        raise UserError(f"{busy}: wait for it, or end it") from error
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            return None
        raise
    return lock


def _lock_within(descriptor: int, kind: int, where: str) -> None:
    """Take a lock, waiting up to LOCK_SECONDS for it; raises UserError."""
    for last in (*(False,) * int(LOCK_SECONDS / 0.1), True):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return
            if last:
                raise UserError(
                    f"{where} is being written by another command of prep. Wait for it, or end it, and run this "
                    "command again."
                ) from error
        time.sleep(0.1)


def _remove_if_left(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        # A writer that has its file open but not yet locked loses it here, and publish_locally writes once more.
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
