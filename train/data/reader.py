"""Reads crops where they lie: a shard's rows from the manifest, its members by their offsets, never a tar parsed.

A shard costs about 3 ms to open (its row group of crops.parquet) and two microseconds per crop from then on; its pages
in memory are the system's, shared by all lanes, workers and ranks of the host. Members are read, not mapped: a mapped
file that shrinks kills the process. Everything is built in the process that reads.
Where shards are files of another machine, data/remote.py fetches them: a shard is always opened as a local file. One
that is left out (a bad one, where the run goes on without it) keeps its rows and has no bytes: its crops are
unreadable.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from jigsaw_pretrain.errors import redacted
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.dataset import CropIndex, Dataset, ShardRow
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.formats.pixels import decode_member
from jigsaw_pretrain.storage.store import Storage
from jigsaw_pretrain.train.data.remote import BadShard, ReadOptions, RemoteShards

CROP = np.dtype(
    [
        ("shard", "<i4"),
        ("row", "<i4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("x", "<i4"),
        ("y", "<i4"),
        ("stored_width", "<i4"),
        ("stored_height", "<i4"),
        ("label", "<i4"),
        ("group", "u1"),
    ]
)
"""A crop: its shard (index in shards.parquet), row there, bytes in the shard, size in pixels, its first pixel in the
stored member and that one's size, label, group's code. Where the member has no margins it is the crop."""

IN_CONTEXT = np.dtype([*CROP.descr, ("left", "<i4"), ("top", "<i4"), ("box", "<f8", 4)])
"""A crop whose context the trainer draws (data/augment.py): as CROP, and its left and top edge in the image, and the
ground-truth box there (x, y, width, height; NaN for background). As read, the crop is the box in whole pixels."""

SOURCE = ["shard", "offset", "size", "width", "height", "x", "y", "stored_width", "stored_height"]
"""The fields that CropReader.decode takes."""

CropArray = npt.NDArray[np.void]


class ShardFiles(Protocol):
    """Where shards are found as local files."""

    def index(self) -> BinaryIO | None:
        """crops.parquet, open for reading; None where it lies in the dataset's own folder."""
        ...

    def ask(self, shard: ShardRow, urgency: int) -> None:
        """Say that a shard will be opened (urgency: data.remote.FIRST or NEXT)."""
        ...

    def open(self, shard: ShardRow) -> BinaryIO:
        """The local file of one shard, complete, for the caller to close; raises BadShard for one that is damaged."""
        ...

    def close(self) -> None:
        """Drop what was asked for and not opened."""
        ...


class LocalShards:
    """The shards of a dataset in a folder of this machine."""

    def __init__(self, dataset: Dataset) -> None:
        self._storage = Storage(dataset.url)

    def index(self) -> None:
        """Nothing: it is a local file too."""

    def ask(self, shard: ShardRow, urgency: int) -> None:
        """Nothing: it is here."""

    def open(self, shard: ShardRow) -> BinaryIO:
        """The file of one shard; raises BadShard where it is missing or not of the size in shards.parquet."""
        name = f"{layout.SHARDS}/{shard.name}"
        wrong = ""
        try:
            path = self._storage.regular_file(name)
            found = path.stat().st_size
            if found != shard.bytes:
                wrong = f"has {found:,} bytes where the manifest says {shard.bytes:,}"
            else:
                return path.open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            wrong = "is missing"
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            wrong = f"cannot be read ({error.strerror or error})"
        raise BadShard(
            f"{self._storage.describe(name)} {wrong}: run `jigsaw-prep verify --repair`, prep the dataset again, "
            "or train without it by --on-bad-shard skip"
        )

    def close(self) -> None:
        """Nothing to drop."""


def shard_files(dataset: Dataset, access: ReadOptions) -> ShardFiles:
    """The shards of a dataset, wherever it lies."""
    return LocalShards(dataset) if Storage(dataset.url).is_local else RemoteShards(dataset, access)


class _OpenShard:
    """One shard's rows (``dtype`` [crops]), keys, and file; None for one that is left out."""

    def __init__(
        self, shard: ShardRow, rows: Mapping[str, npt.NDArray[Any]], file: BinaryIO | None, dtype: np.dtype[Any]
    ) -> None:
        self.crops = np.zeros(shard.crops, dtype=dtype)
        self.crops["shard"], self.crops["row"] = shard.index, np.arange(shard.crops)
        self.crops["group"] = GROUPS.index(shard.group)
        for field in ("offset", "size", "label"):
            self.crops[field] = rows[field]
        self.crops["width"] = rows["right"] - rows["left"]
        self.crops["height"] = rows["bottom"] - rows["top"]
        self.crops["x"], self.crops["y"] = rows["margin_left"], rows["margin_top"]
        self.crops["stored_width"] = rows["margin_left"] + self.crops["width"] + rows["margin_right"]
        self.crops["stored_height"] = rows["margin_top"] + self.crops["height"] + rows["margin_bottom"]
        if dtype == IN_CONTEXT:
            self.crops["left"], self.crops["top"] = rows["left"], rows["top"]
            self.crops["box"] = np.stack([rows[name] for name in schema.BOX], axis=1)
        self.keys = rows.get("key")
        # While it is open the file keeps its place in the cache.
        self.file = file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class CropReader:
    """Reads crops of a dataset; keeps the ``capacity`` shards used last open.

    with_keys: keep the crops' keys as well (about 100 bytes a crop). skip_bad: leave out shards that are damaged,
    instead of raising BadShard. ``left_out`` has the reason for each shard (by index) that is left out. ``dtype`` is
    that of its crops: IN_CONTEXT where the trainer draws their context, which is ``context`` at most; else CROP.
    """

    def __init__(
        self,
        dataset: Dataset,
        files: ShardFiles,
        *,
        capacity: int,
        with_keys: bool = False,
        skip_bad: bool = False,
        left_out: Iterable[str] = (),
    ) -> None:
        self._dataset, self._files, self._capacity = dataset, files, max(1, capacity)
        self._index = CropIndex(dataset, file=files.index())
        self.context = dataset.drawn_context
        self.dtype = CROP if self.context is None else IN_CONTEXT
        self._columns = tuple(name for name in CropIndex.COLUMNS if with_keys or name != "key")
        if self.context is not None:
            self._columns += schema.BOX
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._skip_bad = skip_bad
        self._pixels, self._where = dataset.pixels, redacted(dataset.url)
        before = set(left_out)
        self.left_out = {shard.index: "left out before" for shard in dataset.shards if shard.name in before}

    def ask(self, shard: int, urgency: int) -> None:
        """Say that a shard will be read (urgency: data.remote.FIRST or NEXT)."""
        if shard not in self._open and shard not in self.left_out:
            self._files.ask(self._dataset.shards[shard], urgency)

    def _file(self, shard: ShardRow) -> BinaryIO | None:
        if shard.index in self.left_out:
            return None
        try:
            return self._files.open(shard)
        except BadShard as error:
            self._leave_out(shard.index, error)
            return None

    def _leave_out(self, shard: int, error: BadShard) -> None:
        if not self._skip_bad:
            raise error
        self.left_out[shard] = error.message

    def _shard(self, index: int) -> _OpenShard:
        found = self._open.get(index)
        if found is None:
            shard = self._dataset.shards[index]
            found = _OpenShard(shard, self._index.rows(shard, self._columns), self._file(shard), self.dtype)
            if len(self._open) >= self._capacity:
                self._open.popitem(last=False)[1].close()
            self._open[index] = found
        else:
            self._open.move_to_end(index)
        return found

    def close(self) -> None:
        """Release all shards."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()
        self._files.close()

    def crops(self, shard: int) -> CropArray:
        """All crops of a shard in member order: ``dtype`` [crops]."""
        return self._shard(shard).crops

    def keys(self, crops: CropArray) -> list[str]:
        """The keys of some crops, CROP [n]; only of a reader made with keys."""
        found = []
        for shard, row in zip(crops["shard"].tolist(), crops["row"].tolist(), strict=True):
            keys = self._shard(shard).keys
            assert keys is not None, "the reader was made without keys"
            found.append(str(keys[row]))
        return found

    def decode(
        self, shard: int, offset: int, size: int, width: int, height: int, x: int, y: int, stored: int, high: int
    ) -> npt.NDArray[Any] | None:
        """A crop's RGB pixels, uint8 [height, width, 3], or as formats/pixels.py has them, from the fields of SOURCE.

        They are a view into its member, of ``stored`` x ``high`` pixels, from ``x``, ``y`` on. None where the bytes are
        no whole member of that size.
        """
        file = self._shard(shard).file
        if file is None:
            return None
        raw = os.pread(file.fileno(), size, offset)
        if len(raw) < size:
            name = self._dataset.shards[shard].name
            self._leave_out(shard, BadShard(f"{name} of {self._where} became shorter while it was being read"))
            self._open.pop(shard).close()
            return None
        whole = decode_member(raw, self._pixels, stored, high)
        if whole is None or (stored, high) == (width, height):
            return whole
        return whole[y : y + height, x : x + width]
