"""A run at a URL: where its files are staged on this machine, what goes up and what is fetched.

A run trains in a folder of this machine as any other does; what has changed goes up whole after each checkpoint. A
request of a run that trains is patient, one of a command that reads is not. Costs the run's size on this machine, and
one upload per checkpoint beside the training. Prefer a folder that all hosts see where there is one.
"""

import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

from filelock import FileLock

from jigsaw_pretrain.errors import UserError, name_copies, redacted
from jigsaw_pretrain.formats.dataset.dataset import MOST_BYTES
from jigsaw_pretrain.storage.fetcher import Fetcher
from jigsaw_pretrain.storage.files import atomic_write, inside, lock_file
from jigsaw_pretrain.storage.retries import TooLong, fetch_with_retries
from jigsaw_pretrain.storage.store import ANSWER_SECONDS, MOST_LINES_BYTES, MOST_WHOLE_BYTES, open_store
from jigsaw_pretrain.train.data.remote import default_cache

NEWEST = "checkpoints/newest"
"""The pointer to the newest checkpoint of a run at a URL."""

MOST_WEIGHTS = 1 << 38
"""The most that a checkpoint or a weights file may have, in bytes."""

RETRIES, TIMEOUT = 5, 60.0
"""Retries and silent seconds of a training run's requests: some bad minutes of the store must not end it."""

MOST_NAMES = 100_000
"""The most files that lie at a run's URL."""

READER_RETRIES, READER_TIMEOUT = 1, 10.0
"""The same for a command that reads a run at a URL, where somebody waits for the answer."""

CHECKPOINT_NAME = re.compile(r"step-\d{8,15}\.pt")

FILES = (
    *("run.json", "config.json", "recipe.toml", "metrics.jsonl", "digest.txt", "report.html"),
    *("backbone.pth", "backbone-fpn.pth", "detector.pth", "summary.json", "results.json", "ap.json"),
)
"""The names of the files that lie directly in a run's folder, of a backbone or of a detector."""

_KNOWN = re.compile(
    "|".join(map(re.escape, FILES))
    + r"|page\.html|looks/(fields|answers)-\d{8,15}\.npz|tensorboard/[\w.-]{1,200}"
    + r"|checkpoints/(newest|step-\d{8,15}\.pt)"
)
"""The names of all files that a run has."""

log = logging.getLogger(__name__)


def _most_bytes(name: str) -> int:
    """The most that a file of a run may have, by its name."""
    if name.endswith((".pt", ".pth")):
        return MOST_WEIGHTS
    if name == "results.json":
        return MOST_WHOLE_BYTES
    return MOST_BYTES if name.endswith((".json", ".toml")) or name == NEWEST else MOST_LINES_BYTES


def _is_known(name: str) -> bool:
    return _KNOWN.fullmatch(name) is not None and ".." not in name


class RemoteRunFolder:
    """A run folder at ``url`` and the folder of this machine, ``path``, where its files are staged.

    Only files that have changed go up, whole and in one put each: checkpoints first, then the rest, last a small
    pointer to the newest checkpoint, so that a run is never continued from a half-written one and needs no listing.
    The staged folder is made anew at every start. The process that trains locks it; a process that only reads stages in
    a folder of its own. Names at the URL are not trusted: only those that a run itself has are fetched.
    """

    def __init__(self, url: str, files: tuple[str, ...]) -> None:
        """files: those that continuing a run needs, fetched whether a listing shows them or not."""
        self._files = files
        self.url = url.rstrip("/")
        self.path = default_cache().parent / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:20]
        self._connect(RETRIES, TIMEOUT)
        self._apart: tempfile.TemporaryDirectory[str] | None = None
        self._lock: FileLock | None = None
        self._pushed: dict[str, tuple[int, int]] = {}

    def _connect(self, retries: int, timeout: float) -> None:
        self._retries = retries
        self._storage = open_store(self.url, timeout)
        self._fetcher = Fetcher(self.url, retries, timeout)

    def read_apart(self) -> None:
        """Stage in a folder that goes with this process."""
        if self._apart is None:
            self._connect(READER_RETRIES, READER_TIMEOUT)
            self._apart = tempfile.TemporaryDirectory(prefix="jigsaw-run-")
            self.path = Path(self._apart.name)

    def pull(self) -> None:
        """Make the staged folder what lies at the URL, as far as continuing needs it; empty where there is no run.

        Raises UserError where another process of this machine trains the run.
        """
        self._pull()
        if self._apart is not None:
            name_copies(str(self.path), self.url)

    def _pull(self) -> None:
        from jigsaw_pretrain.train.engine import checkpoint

        try:
            if self._apart is None:
                self.lock()
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.path}: {error.strerror or error}. A run at a URL is staged there: name "
                "another cache folder with XDG_CACHE_HOME"
            ) from error
        for name in {*self._files, *self._listed()}:
            self._fetch(name)
        names = [pointer] if (pointer := self._pointer()) else []
        names += sorted(
            (name for name in self._checkpoints() if name.endswith(".pt") and name not in names), reverse=True
        )
        for name in names:
            self.fetch_checkpoint(name)
            try:
                checkpoint.read_checkpoint(self.path / "checkpoints" / name)
                break
            except UserError:
                # Passed over for the one before; what is damaged there is damaged here, and said by who reads it.
                continue
        self._pushed = {name: self._state(name) for name in self._staged()}

    def lock(self) -> None:
        """Keep other processes of this machine out of the staged folder; raises UserError, OSError."""
        if self._lock is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            busy = f"{redacted(self.url)} is being trained by another process of this machine"
            self._lock = lock_file(Path(f"{self.path}.lock"), busy)

    def close(self) -> None:
        """Let other processes have the staged folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def fetch_checkpoint(self, name: str) -> None:
        """Stage a checkpoint, unless it is (another rank of this host, or its first one, may have)."""
        if not (self.path / "checkpoints" / name).exists():
            self._fetch(f"checkpoints/{name}")

    def holds(self, name: str) -> bool:
        """Whether a file of that name lies at the URL; raises StoreError."""
        return fetch_with_retries(lambda: self._storage.exists(name), self._retries, self._storage.describe(name))

    def push(self) -> None:
        """Publish what has changed, then the pointer; remove checkpoints older than the staged ones."""
        staged = self._staged()
        for name in sorted(staged, key=lambda name: not name.startswith("checkpoints/")):
            state = self._state(name)
            if self._pushed.get(name) != state:
                self._put(name, (self.path / name).read_bytes())
                self._pushed[name] = state
        from jigsaw_pretrain.train.engine import checkpoint

        kept = [path.name for _, path in checkpoint.list_checkpoints(self.path / "checkpoints")]
        if not kept or self._pushed.get(NEWEST) == (int(kept[-1][5:-3]), 0):
            return
        self._put(NEWEST, kept[-1].encode())
        self._pushed[NEWEST] = (int(kept[-1][5:-3]), 0)
        for name in self._checkpoints():
            if name.endswith(".pt") and name < kept[0]:
                old = f"checkpoints/{name}"
                fetch_with_retries(
                    partial(self._storage.remove, old), self._retries, self._storage.describe(old), "removed"
                )

    def _checkpoints(self) -> list[str]:
        """What a listing shows of the checkpoints, and the pointer: a hint."""
        found = fetch_with_retries(
            lambda: self._storage.list("checkpoints"), self._retries, self._storage.describe("checkpoints")
        )
        return [name for name in found if _is_known(f"checkpoints/{name}")]

    def _listed(self) -> list[str]:
        """Further files of the run (pages and what they are made of), as far as a listing shows them."""
        # Some hundred files; a listing that goes on and on is none of a run.
        list_all = partial(self._storage.find, ANSWER_SECONDS, MOST_NAMES)
        found = fetch_with_retries(list_all, 1, self._storage.describe(""))
        return [name for name in found if _is_known(name) and not name.startswith("checkpoints/")]

    def _put(self, name: str, data: bytes) -> None:
        fetch_with_retries(
            lambda: self._storage.publish(name, data), self._retries, self._storage.describe(name), "written"
        )

    def _pointer(self) -> str | None:
        where = self._storage.describe(NEWEST)
        try:
            found = fetch_with_retries(lambda: self._storage.read(NEWEST, MOST_BYTES), self._retries, where)
        except FileNotFoundError:
            return None
        name = found[:100].decode(errors="replace").strip()
        if not CHECKPOINT_NAME.fullmatch(name):
            log.warning("%s names no checkpoint (%r): the newest of the listing is taken", where, name)
            return None
        return name

    def _fetch(self, name: str) -> None:
        try:
            self._fetch_whole(name)
        except TooLong as error:
            raise UserError(f"{self._storage.describe(name)} {error}: it is of no run") from error

    def _fetch_whole(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), atomic_write(inside(self.path, name)) as file:
            self._fetcher.fetch(name, Path(file.name), lambda fetched: None, _most_bytes(name))

    def _staged(self) -> list[str]:
        found = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        return sorted(name.as_posix() for name in found if not name.name.endswith(".tmp"))

    def _state(self, name: str) -> tuple[int, int]:
        status = (self.path / name).stat()
        return status.st_mtime_ns, status.st_size
