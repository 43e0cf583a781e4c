"""``manifests/dataset.json``: what a finished dataset is, and reading its index.

Its presence means that the dataset is complete: prep writes it last and removes it first. Opening a dataset reads two
small files (dataset.json and shards.parquet; 10,000 shards in about 20 ms); row groups of crops.parquet are read as
the trainer gets to their shards. Nothing here parses a tar.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.pixels import PixelFormat, pixel_format
from jigsaw_pretrain.storage import TRIES, Storage

FORMAT_VERSION = 1
"""Of a dataset of 8-bit RGB JPEG crops as section 3.1 has them: what every version of this program reads."""

EXTENDED = 2
"""Of a dataset that a program of version 1 would misread: crops.parquet has the columns of schema.MARGINS."""

READABLE = (FORMAT_VERSION, EXTENDED)


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of dataset.json; manifests/README.md defines each field."""

    format_version: int
    classes: list[str]
    background: int
    seed: int
    plan: str
    options: dict[str, Any]
    versions: dict[str, str]
    totals: dict[str, Any]

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json_bytes(self)


def json_bytes(record: msgspec.Struct) -> bytes:
    """A record as a JSON file: keys sorted, two spaces of indent, a final newline."""
    return msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=2) + b"\n"


class ShardRow(msgspec.Struct, frozen=True):
    """A row of shards.parquet; ``index`` is its place there and its row group in crops.parquet."""

    index: int
    name: str
    group: str
    part: int
    crops: int
    bytes: int
    sha256: str


class Dataset(msgspec.Struct, frozen=True):
    """An opened dataset: its description, its shards in order, and where it lies."""

    url: str
    description: Description
    shards: tuple[ShardRow, ...]
    fingerprint: str

    @property
    def classes(self) -> list[str]:
        """Class names in label order, the background not among them."""
        return self.description.classes

    @property
    def label_count(self) -> int:
        """C + 1: the foreground classes and the background."""
        return self.description.background + 1

    @property
    def pixels(self) -> PixelFormat:
        """What its crops' pixels are."""
        return pixel_format(self.description.options.get("pixels"), layout.DATASET)

    @property
    def measured(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation by channel of all members' pixels, in units of full scale; empty for RGB8."""
        totals = self.description.totals
        return tuple(totals.get("mean", ())), tuple(totals.get("std", ()))

    @property
    def drawn_context(self) -> float | None:
        """How many times as wide and high a crop may become as the trainer draws it; None: prep drew it, for all."""
        return drawn_context(self.description.options)

    def of_group(self, group: str) -> tuple[ShardRow, ...]:
        """The shards of one aspect group, by part."""
        return tuple(shard for shard in self.shards if shard.group == group)


def drawn_context(options: Mapping[str, Any]) -> float | None:
    """The context that the trainer draws from, by the options of dataset.json or plan.json; None where prep does."""
    return float(options["context"]) if options.get("context_at") == "train" else None


def open_dataset(url: str, options: Mapping[str, Any] | None = None, tries: int = TRIES) -> Dataset:
    """Read dataset.json and shards.parquet below ``url`` (a folder or an fsspec URL), each in up to ``tries`` tries.

    Raises UserError where there is none, where prep has not finished, or where the format is newer than this program.
    """
    storage = Storage(url, options, tries)
    if not storage.exists(layout.DATASET):
        raise UserError(
            f"{storage.describe(layout.DATASET)} is missing: no dataset has been finished there. "
            f"Run `make shards OUT={url}` (or `jigsaw-prep shards --out {url} ...`), which resumes what was begun."
        )
    raw = storage.read(layout.DATASET)
    try:
        version = msgspec.json.decode(raw, type=dict[str, Any]).get("format_version")
        if version not in READABLE:
            raise UserError(
                f"{storage.describe(layout.DATASET)} is of format version {version}; this program reads versions "
                f"{' and '.join(str(one) for one in READABLE)}. Prep the dataset again with this version."
            )
        description = msgspec.json.decode(raw, type=Description)
        drawn_context(description.options)
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{storage.describe(layout.DATASET)} is damaged ({error}). Prep the dataset again.") from error
    table_raw = storage.read(layout.SHARD_TABLE)
    try:
        rows = schema.read_rows(table_raw).to_pylist()
        shards = tuple(ShardRow(index, **row) for index, row in enumerate(rows))
    except Exception as error:
        raise UserError(
            f"{storage.describe(layout.SHARD_TABLE)} is damaged ({error}). "
            "Run `jigsaw-prep verify --repair`, or prep the dataset again."
        ) from error
    fingerprint = hashlib.sha256(raw + table_raw).hexdigest()
    return Dataset(url, description, shards, fingerprint)


def memory_file(raw: bytes) -> Any:
    """A readable file over bytes, as pyarrow wants it."""
    import pyarrow as pa

    return pa.BufferReader(raw)


class CropIndex:
    """The rows of crops.parquet for single shards, one row group at a time.

    Holds the file open (local) or fetched once whole (remote); build it in the process that reads. raw: the file's
    bytes, where the caller has them (mapped, they cost no memory).
    """

    COLUMNS = ("key", "label", "left", "top", "right", "bottom", "offset", "size", *schema.MARGINS)

    def __init__(self, dataset: Dataset, options: Mapping[str, Any] | None = None, raw: Any = None) -> None:
        storage = Storage(dataset.url, options)
        self._name = storage.describe(layout.CROPS)
        if storage.is_local and raw is None:
            self._file = pq.ParquetFile(str(storage.local_path(layout.CROPS)))
        else:
            self._file = pq.ParquetFile(memory_file(storage.read(layout.CROPS) if raw is None else raw))
        if self._file.num_row_groups != len(dataset.shards):
            raise UserError(
                f"{self._name} has {self._file.num_row_groups} row groups for {len(dataset.shards)} shards: it is of "
                "another dataset. Prep the dataset again."
            )

    def rows(self, shard: ShardRow, columns: tuple[str, ...] = COLUMNS) -> dict[str, npt.NDArray[Any]]:
        """Columns of one shard's crops in member order, each a numpy array of ``shard.crops`` elements."""
        held = [name for name in columns if name in self._file.schema_arrow.names]
        table = self._file.read_row_group(shard.index, columns=held, use_threads=False)
        rows = {name: np.asarray(table.column(name).to_numpy(zero_copy_only=False)) for name in held}
        # Members of version 1 are their crops and nothing beyond.
        none = np.zeros(shard.crops, dtype=np.int32)
        return {name: none if name in schema.MARGINS and name not in rows else rows[name] for name in columns}
