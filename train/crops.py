"""Crops where they lie: a shard's rows from the manifest and its bytes memory-mapped, never a tar parsed.

A shard costs about 3 ms to open (its row group of crops.parquet) and a microsecond a crop from then on; pages of a
mapped shard are shared by all lanes, workers and ranks of the host. Everything is built in the process that reads.
Where shards are files of another machine, ShardFiles is what fetches them: a shard is always opened as a local file.
"""

import mmap
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg

from formats import names
from formats.dataset import CropIndex, Dataset, ShardRow
from formats.errors import UserError
from formats.storage import Storage

CROP = np.dtype(
    [
        ("shard", "<i4"),
        ("row", "<i4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("label", "<i4"),
        ("group", "u1"),
    ]
)
"""A crop: its shard (index in shards.parquet), row there, bytes in the shard, size in pixels, label, group's code."""

SOURCE = ["shard", "offset", "size", "width", "height"]
"""The fields that CropReader.decode takes."""

Crops = npt.NDArray[np.void]


class ShardFiles(Protocol):
    """Where shards are found as local files."""

    def path(self, shard: ShardRow) -> Path:
        """The local file of one shard, complete."""
        ...


class LocalShards:
    """The shards of a dataset in a folder of this machine."""

    def __init__(self, dataset: Dataset, options: Mapping[str, Any] | None = None) -> None:
        self._storage = Storage(dataset.url, options)
        if not self._storage.is_local:
            raise UserError(f"{dataset.url} is not a folder of this machine: copy the dataset to one first")

    def path(self, shard: ShardRow) -> Path:
        """The file of one shard; raises UserError where it is missing or not of the size in shards.parquet."""
        name = f"{names.SHARDS}/{shard.name}"
        path = self._storage.local_path(name)
        found = path.stat().st_size if path.is_file() else None
        if found != shard.bytes:
            wrong = "is missing" if found is None else f"has {found:,} bytes where the manifest says {shard.bytes:,}"
            raise UserError(
                f"{self._storage.describe(name)} {wrong}: run `jigsaw-prep verify --repair`, or prep the dataset again"
            )
        return path


class _OpenShard:
    """One shard's rows (CROP [crops]), keys, and bytes."""

    def __init__(self, shard: ShardRow, rows: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
        self.crops = np.zeros(shard.crops, dtype=CROP)
        self.crops["shard"], self.crops["row"] = shard.index, np.arange(shard.crops)
        self.crops["group"] = "STW".index(shard.group)
        for field in ("offset", "size", "label"):
            self.crops[field] = rows[field]
        self.crops["width"] = rows["right"] - rows["left"]
        self.crops["height"] = rows["bottom"] - rows["top"]
        self.keys = rows.get("key")
        with path.open("rb") as file:
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class CropReader:
    """Reads crops of a dataset; keeps the ``capacity`` shards used last open.

    with_keys: keep the crops' keys as well (about 100 bytes a crop).
    """

    def __init__(self, dataset: Dataset, files: ShardFiles, *, capacity: int, with_keys: bool = False) -> None:
        self._dataset, self._files, self._capacity = dataset, files, max(1, capacity)
        self._index = CropIndex(dataset)
        self._columns = tuple(name for name in CropIndex.COLUMNS if with_keys or name != "key")
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def _shard(self, index: int) -> _OpenShard:
        found = self._open.get(index)
        if found is None:
            shard = self._dataset.shards[index]
            found = _OpenShard(shard, self._index.rows(shard, self._columns), self._files.path(shard))
            if len(self._open) >= self._capacity:
                self._open.popitem(last=False)
            self._open[index] = found
        else:
            self._open.move_to_end(index)
        return found

    def crops(self, shard: int) -> Crops:
        """All crops of a shard in member order: CROP [crops]."""
        return self._shard(shard).crops

    def keys(self, crops: Crops) -> list[str]:
        """The keys of some crops, CROP [n]; only of a reader made with keys."""
        found = []
        for shard, row in zip(crops["shard"].tolist(), crops["row"].tolist(), strict=True):
            keys = self._shard(shard).keys
            assert keys is not None, "the reader was made without keys"
            found.append(str(keys[row]))
        return found

    def decode(self, shard: int, offset: int, size: int, width: int, height: int) -> npt.NDArray[np.uint8] | None:
        """A crop's RGB pixels, uint8 [height, width, 3]; None where its bytes are no whole JPEG of that size."""
        try:
            pixels = simplejpeg.decode_jpeg(self._shard(shard).bytes[offset : offset + size], colorspace="RGB")
        except ValueError:
            return None
        return pixels if pixels.shape == (height, width, 3) else None
