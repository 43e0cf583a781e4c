"""Run folders at a URL: staged in a folder of this machine, published at every checkpoint.

A lost machine then loses the steps since the last checkpoint and nothing else. Files go up whole, in one put each, what
has changed only: checkpoints first, then the rest, last a small pointer to the newest checkpoint, so that a run is
never continued from a half-written one and needs no listing to be found. Costs the upload of a checkpoint (ResNet-50:
190 MB) while the ranks wait, so choose checkpoint_every by it. The staged folder is made anew at every start.

Prefer a local folder with a copying job beside it where the store is slow; a mounted network folder needs none of this.
"""

import hashlib
import shutil
from functools import partial

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.storage import Fetcher, open_store, retrying, temporary_beside
from jigsaw_pretrain.train.data.cache import default_folder
from jigsaw_pretrain.train.engine.checkpoint import list_checkpoints, read_checkpoint

NEWEST = "checkpoints/newest"

FILES = ("run.json", "recipe.toml", "metrics.jsonl", "digest.txt")
"""What a run is continued with, beside its newest checkpoint."""

RETRIES, TIMEOUT = 5, 60.0


class Mirror:
    """A run folder at ``url`` and the folder of this machine, ``path``, where its files are staged."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.path = default_folder().parent / "runs" / hashlib.sha256(self.url.encode()).hexdigest()[:20]
        self._storage = open_store(self.url, TIMEOUT)
        self._fetcher = Fetcher(self.url, RETRIES, TIMEOUT)
        self._pushed: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Make the staged folder what lies at the URL, as far as continuing needs it; empty where there is no run."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for name in {*FILES, *self._listed()}:
            self._fetch(name)
        names = [pointer] if (pointer := self._pointer()) else []
        names += sorted(
            (name for name in self._checkpoints() if name.endswith(".pt") and name not in names), reverse=True
        )
        for name in names:
            self.fetch_checkpoint(name)
            try:
                read_checkpoint(self.path / "checkpoints" / name)
                break
            except UserError:
                # Passed over for the one before; what is damaged there is damaged here, and said by who reads it.
                continue
        self._pushed = {name: self._state(name) for name in self._staged()}

    def fetch_checkpoint(self, name: str) -> None:
        """Stage a checkpoint, unless it is (another rank of this host, or its first one, may have)."""
        if not (self.path / "checkpoints" / name).exists():
            self._fetch(f"checkpoints/{name}")

    def push(self) -> None:
        """Publish what has changed, then the pointer; remove checkpoints older than the staged ones."""
        staged = self._staged()
        for name in sorted(staged, key=lambda name: not name.startswith("checkpoints/")):
            state = self._state(name)
            if self._pushed.get(name) != state:
                self._put(name, (self.path / name).read_bytes())
                self._pushed[name] = state
        kept = [path.name for _, path in list_checkpoints(self.path / "checkpoints")]
        if not kept or self._pushed.get(NEWEST) == (int(kept[-1][5:-3]), 0):
            return
        self._put(NEWEST, kept[-1].encode())
        self._pushed[NEWEST] = (int(kept[-1][5:-3]), 0)
        for name in self._checkpoints():
            if name.endswith(".pt") and name < kept[0]:
                old = f"checkpoints/{name}"
                retrying(partial(self._storage.remove, old), RETRIES, self._storage.describe(old), "removed")

    def _checkpoints(self) -> list[str]:
        """What a listing shows of the checkpoints: a hint."""
        return retrying(lambda: self._storage.list("checkpoints"), RETRIES, self._storage.describe("checkpoints"))

    def _listed(self) -> list[str]:
        """Further files of the run (pages and what they are made of), as far as a listing shows them."""
        root = self._storage.root.rstrip("/") + "/"
        found = retrying(lambda: list(self._storage.fs.find(root)), RETRIES, self.url)
        named = (path.partition(root)[2] for path in found)
        return [name for name in named if name and not name.startswith("checkpoints/")]

    def _put(self, name: str, data: bytes) -> None:
        retrying(lambda: self._storage.publish(name, data), RETRIES, self._storage.describe(name), "written")

    def _pointer(self) -> str | None:
        where = self._storage.describe(NEWEST)
        try:
            return retrying(lambda: self._storage.read(NEWEST), RETRIES, where).decode().strip()
        except FileNotFoundError:
            return None

    def _fetch(self, name: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            self._fetcher.fetch(name, temporary, lambda fetched: None)
            temporary.replace(path)
        except FileNotFoundError:
            temporary.unlink(missing_ok=True)

    def _staged(self) -> list[str]:
        found = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        return sorted(name.as_posix() for name in found if not name.name.endswith(".tmp"))

    def _state(self, name: str) -> tuple[int, int]:
        status = (self.path / name).stat()
        return status.st_mtime_ns, status.st_size
