"""Where files lie: a folder of this machine or a prefix of an object store, through fsspec.

A file is published whole or not at all: locally by ``atomic_write``, in a store as one put of bytes that are complete.
Nothing is ever written through an open remote stream, whose block publishes what it has when an exception leaves it.
Listings are never cached, and nothing but hints is taken from them. Credentials and endpoints come from the drivers'
own environment and configuration, and are left out of all messages. Build a Storage in the process that uses it:
drivers do not survive a fork.

Requests to a store are tried again, as most failures pass, with waits that grow and are drawn at random, so that a
thousand workers that failed together do not come back together. This costs nothing where the first try succeeds; a
store that is down costs about half a minute before that is reported. Many small requests go through ``map_ahead``: a
thousand of 20 ms take a second or two. Work that computes goes to processes (prep/executors.py).
"""

import asyncio
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import gc
import os
import random
import re
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from jigsaw_pretrain.drivers import (
    CONNECTIONS,
    LEAST_RATE,
    NoRanges,
    driver_options,
    is_s3,
    is_web,
    leave_retries,
    part_of_s3_file,
    part_of_web_file,
)
from jigsaw_pretrain.errors import UserError

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

Answer = TypeVar("Answer")
Item = TypeVar("Item")
Result = TypeVar("Result")

ANSWER_SECONDS, CONTENT_SECONDS = 15.0, 600.0
"""How long one request for a listing or a size may take in all, and one for content, whatever the driver."""

PATIENCE_SECONDS = 12.0
"""After so long a failed request of a Storage is not made again: a store that is silent is told of within 30 s."""

TRIES = 8
"""How often a request of a Storage is made before its failure is raised."""

FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0
"""Seconds before a second try of ``with_retries``, and the most before any."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0
"""The same of ``fetch_with_retries``."""

PUBLISH_TRIES = 5
"""How often a local file is written again after a sweep took its temporary file away."""

STALE_SECONDS = 3600.0
"""Age of a temporary file that a dead process left, where the file system knows no locks."""

LOCK_SECONDS = 3.0
"""How long another's lock on a folder is waited for."""

MOST_WHOLE_BYTES = 16 << 30
"""The most that a file may have which is read whole, where its reader states no less: an annotation file's."""

MOST_LINES_BYTES = 4 << 30
"""The most that a run's file of one line per step may have: twenty million rows."""

_PIECE = 1 << 20

LOCAL_THREADS, REMOTE_THREADS = 4, CONNECTIONS
"""How many things are asked for at the same time: the latency of a store is hidden by width."""

_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError),
    *(UserError, NotImplementedError, ImportError, MemoryError),
)
_HOPELESS = (FileNotFoundError, UserError, ImportError, TypeError, AttributeError, NotImplementedError)
_SETTLED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EINVAL)
"""What no further try changes: a full disk, a file that is too large or none."""
_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials", "ProfileNotFound")
_EMPTY = re.compile(r"\b416\b|InvalidRange|(?i:range is not (valid|satisfiable))")
"""What stores say of a range of an empty file."""

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")

# Not the module's own generator: a forked worker inherits its state, and workers must not wait alike.
_RANDOM = random.SystemRandom()


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
            self.fs, root = url_to_fs(self.url, **{**driver_options(self.url), **dict(options or {})})
        except (ImportError, ValueError) as error:
            scheme = self.url.split("://")[0]
            raise UserError(
                f"{redacted(self.url)}: no driver for {scheme}:// ({redacted(str(error))}). "
                "Install one: pip install 'jigsaw-pretrain[s3]' (or [gcs], [azure], [http])."
            ) from error
        except OSError as error:
            # Some connect at once.
            raise StoreError(f"{redacted(self.url)}: {redacted(_first_line(error))}") from error
        except Exception as error:
            # Of drivers that need more than a URL, and of what their libraries raise.
            raise UserError(
                f"{redacted(self.url)} cannot be opened ({redacted(_first_line(error))}): its driver takes no such "
                "URL. Name a folder, or a URL of s3://, gs://, az:// or https://."
            ) from error
        self.root = root.rstrip("/") or "/"
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if isinstance(self.fs, AsyncFileSystem):
            _watch_forks()
        leave_retries(self.fs)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def _ask(self, action: Callable[[], Answer], name: str) -> Answer:
        if not self.is_local:
            return with_retries(action, self.describe(name), self._tries)
        try:
            return action()
        except OSError as error:
            # Of the process, not of the file: nobody may call that damaged.
            if error.errno in _LOCAL and (told := _told(error, self.describe(name))) is not None:
                raise told from error
            raise

    def _call(self, method: str, *arguments: Any, seconds: float = ANSWER_SECONDS, **named: Any) -> Any:
        """What a method of the driver returns; TimeoutError after so many seconds, of drivers that can be left."""
        if isinstance(self.fs, AsyncFileSystem):
            return sync(self.fs.loop, getattr(self.fs, f"_{method}"), *arguments, timeout=seconds, **named)
        return getattr(self.fs, method)(*arguments, **named)

    def local_path(self, name: str) -> Path:
        """The path of a file of a local root."""
        if not self.is_local:
            raise ValueError(f"{self.describe(name)} is not a local file")
        return Path(self._path(name))

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
                self._ask(lambda: self._call("info", self._path(name)), name)
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
        path = self._path(name)
        try:
            if is_web(self.url) or is_s3(self.url):
                part = part_of_web_file if is_web(self.url) else part_of_s3_file
                return sync(self.fs.loop, part, self.fs, path, offset, size, timeout=CONTENT_SECONDS)
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
            found = self._ask(lambda: self._call("ls", self._path(folder), detail=True), folder)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        entries = (
            Entry(str(info["name"]).rstrip("/").rsplit("/", 1)[-1], int(info.get("size") or 0), _written(info))
            for info in found
        )
        return tuple(sorted(entries, key=lambda entry: entry.name))

    def find(self, seconds: float = CONTENT_SECONDS) -> tuple[str, ...]:
        """The paths of all files below the root, relative to it, sorted; TimeoutError after so many seconds."""
        return self.survey(seconds)[0]

    def survey(self, seconds: float = CONTENT_SECONDS) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The paths of all files below the root, and links to folders that are not followed, each sorted.

        Links to folders are followed within the root; those that lead out of it, or back to a folder that holds them,
        are not.
        """
        if self.is_local:
            return _walk(Path(self.root))
        root = self.root.rstrip("/") + "/"
        found = self._ask(lambda: tuple(self._call("find", self.root, seconds=seconds)), "")
        return tuple(sorted(str(path).removeprefix(root) for path in found)), ()

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
            self._ask(lambda: self._call("pipe_file", self._path(name), data, seconds=CONTENT_SECONDS), name)

    def size(self, name: str) -> int | None:
        """The bytes of a file; None where there is none."""
        try:
            return int(self._ask(lambda: self._call("info", self._path(name)), name)["size"])
        except (FileNotFoundError, NotADirectoryError, TypeError):
            return None

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: self._call("rm_file", self._path(name)), name)

    @contextlib.contextmanager
    def locked(self, exclusive: bool) -> Iterator[Callable[[], None]]:
        """Hold a lock on a local root, exclusively or shared with others; gives what makes an exclusive one shared.

        Leaves no file. Does nothing for a store, nor where the file system knows no locks. Raises UserError where
        others keep it for LOCK_SECONDS.
        """
        if not self.is_local or fcntl is None:
            yield lambda: None
            return
        folder = self.local_path("")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _lock_within(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, self.describe(""))
            yield lambda: _lock_within(descriptor, fcntl.LOCK_SH, self.describe(""))
        finally:
            os.close(descriptor)

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


class StoreError(OSError):
    """A request that failed for good, in words without credentials."""


class WrongContent(Exception):
    """What was fetched is not what the manifest says; the message says how."""


class TooLong(WrongContent):
    """What was fetched has more bytes than such a file may have: no further try changes that."""


def with_retries(
    action: Callable[[], Answer],
    what: str,
    tries: int = TRIES,
    *,
    waits: tuple[float, float, float] | None = None,
    failure: "Callable[[Exception, str, bool], Exception | None] | None" = None,
) -> Answer:
    """What ``action`` returns, tried up to ``tries`` times; ``what`` names the thing in messages.

    FileNotFoundError and the like are raised at once; StoreError after the last try; UserError without credentials.
    Callers may decide otherwise. failure: gives what to raise for an exception of the action, told ``what`` and whether
    this was the last try; None to try again. waits: seconds before the second try at most, before any try at most, and
    the least share of these that is waited; each wait may be twice as long as the one before.
    """
    first, longest, least = waits or (FIRST_WAIT, LONGEST_WAIT, 0.0)
    begun = time.monotonic()
    for attempt in range(tries):
        try:
            return action()
        except Exception as error:
            is_last = attempt + 1 == tries or (failure is None and time.monotonic() - begun > PATIENCE_SECONDS)
            raised = (failure or _store_failure)(error, what, is_last)
            if raised is error:
                raise
            if raised is not None:
                raise raised from error
        time.sleep(min(longest, first * 2**attempt) * _RANDOM.uniform(least, 1.0))
    raise AssertionError("unreachable")


def _store_failure(error: Exception, what: str, is_last: bool) -> Exception | None:
    """What a request of a Storage raises for a failure; None where it is made again."""
    told = _told(error, what)
    if told is not None or isinstance(error, _FINAL):
        return told or error
    name = type(error).__name__
    if any(word in name for word in _CREDENTIALS):
        return UserError(
            f"{redacted(what)}: the driver found no credentials ({name}). Give them in its usual way, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if is_last or not is_transient(error):
        return StoreError(f"{redacted(what)}: {name} {redacted(' '.join(str(error).split())[:200])}".rstrip())
    return None


_MEANINGS = {
    **dict.fromkeys(
        ("ExpiredToken", "TokenRefreshRequired", "RequestExpired"), "the credentials have expired: renew them"
    ),
    **dict.fromkeys(
        ("PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "307", "IllegalLocationConstraintException"),
        "the store redirects to another place: name the bucket's own region (AWS_REGION) or endpoint",
    ),
    "AuthorizationHeaderMalformed": "the bucket is in another region: name it in AWS_REGION",
    **dict.fromkeys(("SignatureDoesNotMatch", "InvalidAccessKeyId"), "the credentials are wrong"),
    "RequestTimeTooSkewed": "this machine's clock is wrong, so the store refuses its signatures",
    "TooManyRedirects": "the web server redirects without end: name the address that it leads to",
    **dict.fromkeys(
        ("NonHttpUrlRedirectClientError", "InvalidUrlRedirectClientError"),
        "the web server redirects to what is no web address: ask whoever runs it for the right one",
    ),
    "401": "the web server asks for credentials, or those in the URL have expired",
    "403": "the web server refuses access: the credentials or the signature in the URL are wrong or have expired",
}
"""What a store's or a web server's refusal means, by its code or its exception's name."""

_LOCAL = (errno.EMFILE, errno.ENFILE)


def _told(error: Exception, what: str) -> UserError | None:
    """A failure that no further try will change and whose cause is known, in words."""
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return UserError(
            f"{redacted(what)}: too many files are open: raise the limit (ulimit -n), or use fewer --workers"
        )
    response = getattr(error.__cause__, "response", None)
    codes = [str(response.get("Error", {}).get("Code"))] if isinstance(response, dict) else []
    codes += [str(_status(error)), *(type(one).__name__ for one in _chain(error))]
    if "maximum recursion depth" in str(error):
        # So ends botocore where a store redirects to itself.
        codes.append("Redirect")
    meaning = next((_MEANINGS[code] for code in codes if code in _MEANINGS), None)
    return UserError(f"{redacted(what)}: {meaning} ({redacted(_first_line(error))})") if meaning else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> Any:
    """The status of an answer, by whichever name the driver gives it; None where there is none."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((one for one in found if isinstance(one, int)), None)


def is_transient(error: Exception) -> bool:
    """Whether a failure may pass: all but those that say the request itself is wrong (4xx and the driver's own)."""
    if isinstance(error, ValueError | TypeError):
        return False
    status = _status(error)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))


def fetch_with_retries(action: Callable[[], Answer], retries: int, what: str, verb: str = "read") -> Answer:
    """The result of ``action``, tried again up to ``retries`` times, whatever fails: for files that training needs.

    Raises UserError naming ``what`` where the store keeps failing or cannot be asked, WrongContent where its content
    keeps being wrong, FileNotFoundError where there is none.
    """

    def failure(error: Exception, what: str, is_last: bool) -> Exception | None:
        if (told := _told(error, what)) is not None:
            return told
        if isinstance(error, PermissionError):
            return UserError(redacted(f"{what} may not be {verb} ({_first_line(error)}): check the credentials"))
        settled = isinstance(error, OSError) and error.errno in _SETTLED
        if settled or isinstance(error, (*_HOPELESS, TooLong)) or (is_last and isinstance(error, WrongContent)):
            return error
        if is_last:
            return UserError(
                f"{redacted(what)} cannot be {verb} after {retries + 1} attempts ({redacted(_first_line(error))}): "
                "check the store and the network, then run the command again (pretrain: with --resume); --read-retries "
                "and --read-timeout allow for a worse one"
            )
        return None

    # Half of each wait is certain: a training run has few readers, and a store that is down needs time.
    return with_retries(action, what, retries + 1, waits=(FIRST_PAUSE, LONGEST_PAUSE, 0.5), failure=failure)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


_SECRET = re.compile(
    r"(?i)\b([\w-]*(?:token|signature|secret|password|passwd|credential|accesskey|access_key|apikey|api_key|sig))=[^\s&'\")]+"
)


def redacted(text: str) -> str:
    """A text without what may be secret in its URLs: user names and passwords, queries, fragments, tokens."""
    text = re.sub(r"://[^/\s'\"]*@", "://", text)
    text = re.sub(r"(://[^\s'\")>?#]*)[?#][^\s'\")>]+", r"\1?...", text)
    return _SECRET.sub(r"\1=...", text)


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
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # A write that fails (a full disk) does not say of which file.
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
                    f"{where} is being written by another jigsaw-prep command. Wait for it, or end it, and run this "
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


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Map a function over items with threads; results in order, at most twice ``threads`` computed ahead."""
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


def open_store(url: str, timeout: float, connections: int = REMOTE_THREADS, **options: Any) -> Storage:
    """The storage of a URL, told not to retry by itself, nor its driver where that can be told: callers do."""
    return Storage(url, {**driver_options(url, timeout, timeout, connections), **options}, tries=1)


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
        fs, remote = storage.fs, f"{storage.root.rstrip('/')}/{name}"
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


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_keep_inherited)
