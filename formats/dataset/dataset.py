"""``manifests/dataset.json``: what a finished dataset is, and reading its index.

Its presence means that the dataset is complete: prep writes it last and removes it first. Opening a dataset reads two
small files (dataset.json and shards.parquet; 10,000 shards in about 20 ms); row groups of crops.parquet are read as
the trainer gets to their shards. Nothing here parses a tar.

Datasets are shared, so each is read as a stranger's: everything is checked whole against what prep writes, and anything
else is refused with a UserError that names the file.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import UNSET, Meta, UnsetType

from jigsaw_pretrain.errors import UserError
from jigsaw_pretrain.formats.dataset import layout, schema
from jigsaw_pretrain.formats.dataset.schema import DamagedTable, check_crops, open_table, read_group
from jigsaw_pretrain.formats.jigsaw import GROUPS
from jigsaw_pretrain.formats.pixels import RGB8, PixelFormat, pixel_format
from jigsaw_pretrain.storage.retries import TRIES
from jigsaw_pretrain.storage.store import Storage, location

FORMAT_VERSION = 1
"""The version of datasets of 8-bit RGB JPEG crops as section 3.1 has them: all versions of this program read it."""

EXTENDED = 2
"""The version of datasets that a program of version 1 would misread: crops.parquet has schema.MARGINS."""

READABLE = (FORMAT_VERSION, EXTENDED)


MOST_BYTES = 64 << 20
"""The most that a JSON file of a dataset may have: a million classes, or as many skipped images of one part."""

MOST_ROW_BYTES = 4096
"""The most that a row of crops.parquet takes: a path, twice."""

MOST_CROPS = 1 << 22
"""The most crops of one shard."""

LEAST_BYTES = 2048
"""The least that a crop takes of a tar: two headers, the label and the member."""

MOST_SHARD_BYTES = 1 << 40

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Classes = Annotated[list[Annotated[str, Meta(max_length=10_000)]], Meta(min_length=1, max_length=100_000)]


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of dataset.json; manifests/README.md defines each field."""

    format_version: int
    classes: Classes
    background: int
    seed: int
    plan: Sha256
    options: dict[str, Any]
    versions: dict[str, str]
    totals: dict[str, Any]
    crops_sha256: Sha256 | UnsetType = UNSET
    """SHA-256 of crops.parquet; datasets of earlier programs do not have it."""

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json_bytes(self)


def json_bytes(record: msgspec.Struct) -> bytes:
    """A record as a JSON file: keys sorted, two spaces of indent, a final newline."""
    return msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=2) + b"\n"


Subsampling = Literal["444", "422", "420", "440", "411"]

Encoding = Literal["pixels", "lossless"]

ContextAt = Literal["prep", "train"]

Context = Annotated[float, Meta(ge=1, le=10)]

JpegQuality = Annotated[int, Meta(ge=1, le=100)]

CropsPerPart = Annotated[int, Meta(ge=1)]

NegativesPerPositive = Annotated[float, Meta(ge=0, le=100)]


class _Options(msgspec.Struct):
    """What readers of dataset.json and plan.json rely on among the options."""

    context: Context | UnsetType = UNSET
    context_at: ContextAt | UnsetType = UNSET
    encode: Encoding | UnsetType = UNSET
    exif: Literal["ignore", "apply"] | UnsetType = UNSET
    subsampling: Subsampling | UnsetType = UNSET
    jpeg_quality: JpegQuality | UnsetType = UNSET
    crops_per_part: CropsPerPart | UnsetType = UNSET
    negatives_per_positive: NegativesPerPositive | UnsetType = UNSET
    annotations_sha256: Sha256 | UnsetType = UNSET
    split: Annotated[str, Meta(max_length=10_000)] | None | UnsetType = UNSET


class _Totals(msgspec.Struct):
    """What readers of dataset.json rely on among the totals."""

    images: Count | UnsetType = UNSET
    crops: Count | UnsetType = UNSET
    by_label: list[Count] | UnsetType = UNSET
    mean: list[float] | UnsetType = UNSET
    std: list[Annotated[float, Meta(ge=0)]] | UnsetType = UNSET


def check_options(options: Mapping[str, Any], where: str) -> PixelFormat:
    """The pixel format of recorded options; raises UserError where they are not what prep records."""
    try:
        found = msgspec.convert(options, _Options)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} is damaged (options: {error}). Prep the dataset again.") from error
    if found.context_at == "train" and found.context is UNSET:
        raise UserError(f"{where} is damaged (options: the context is missing). Prep the dataset again.")
    return pixel_format(options.get("pixels"), where)


def _check_totals(description: Description, pixels: PixelFormat) -> None:
    """Raise ValidationError for totals that prep does not write."""
    found = msgspec.convert(description.totals, _Totals)
    if found.by_label is not UNSET and len(found.by_label) != len(description.classes) + 1:
        raise msgspec.ValidationError("by_label does not have a count for each label")
    for name in ("mean", "std"):
        values = getattr(found, name)
        if pixels != RGB8 and (values is UNSET or len(values) != pixels.channels):
            raise msgspec.ValidationError(f"{name} does not have a number for each channel")
        if values is not UNSET and not all(math.isfinite(value) for value in values):
            raise msgspec.ValidationError(f"{name} is not finite")


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

    @property
    def most_index_bytes(self) -> int:
        """The most that crops.parquet may have: about 60 bytes per crop are usual."""
        return MOST_BYTES + MOST_ROW_BYTES * sum(shard.crops for shard in self.shards)

    def of_group(self, group: str) -> tuple[ShardRow, ...]:
        """The shards of one aspect group, by part."""
        return tuple(shard for shard in self.shards if shard.group == group)

    def table(self) -> pa.Table:
        """Every crop as a row of one table, with ``class_name``, under names that SQL takes without quotes.

        The columns are those of crops.parquet: ``group`` is ``aspect_group`` here, the crop's edges are ``crop_left``
        and so on, ``offset`` and ``size`` are ``byte_offset`` and ``byte_size``. A million crops take about 300 MB.

        Returns:
            A table of pyarrow's, for its own functions, pandas, DuckDB or Polars.

        Raises:
            UserError: crops.parquet is damaged, or of another dataset.
            StoreError: The store fails.
        """
        index = CropIndex(self)
        names = np.array([*self.classes, "background"], dtype=object)
        found = pa.concat_tables([index.table(shard) for shard in self.shards])
        found = found.rename_columns([schema.SQL_NAMES.get(name, name) for name in found.column_names])
        place = found.column_names.index("label") + 1
        return found.add_column(place, "class_name", pa.array(names[found.column("label").to_numpy()], pa.string()))


def drawn_context(options: Mapping[str, Any]) -> float | None:
    """The context that the trainer draws from, by the options of dataset.json or plan.json; None where prep does."""
    return float(options["context"]) if options.get("context_at") == "train" else None


def require_dataset(given: Any, name: str = "dataset") -> None:
    """Raise UserError, which calls it ``name``, for what is no opened dataset."""
    if not isinstance(given, Dataset):
        raise UserError(f"{name} must be a Dataset, not {given!r:.80}: give open_dataset(...) of its folder or URL")


def open_dataset(url: str | os.PathLike[str], options: Mapping[str, Any] | None = None, tries: int = TRIES) -> Dataset:
    """Open the finished dataset below ``url``; reads dataset.json and shards.parquet.

    Args:
        url: A folder or an fsspec URL.
        options: For the store's driver.
        tries: How often each file is asked for.

    Returns:
        The dataset: its description, classes and shards.

    Raises:
        UserError: There is none, prep has not finished, files are damaged, or the format is newer than this program.
        StoreError: The store fails.
    """
    url = location(url, "url")
    storage = Storage(url, options, tries)
    with _named_errors(storage):
        try:
            # Read at once: a store says why it refuses, such as an expired token, to a GET alone.
            raw = storage.read(layout.DATASET, MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            shown = storage.describe("")
            raise UserError(
                f"{storage.describe(layout.DATASET)} is missing: no dataset has been finished there. "
                f"Run `make shards OUT={shown}` (or `jigsaw-prep shards --out {shown} ...`), which resumes "
                "what was begun."
            ) from error
        description = read_description(raw, storage.describe(layout.DATASET))
        table = storage.read(layout.SHARD_TABLE, MOST_BYTES)
    try:
        shards = _shard_rows(schema.read_table(table, schema.SHARDS))
    except DamagedTable as error:
        raise UserError(f"{storage.describe(layout.SHARD_TABLE)} {error}. {MEND}") from error
    return Dataset(url, description, shards, hashlib.sha256(raw + table).hexdigest())


MEND = "Run `jigsaw-prep verify --repair`, or prep the dataset again."


@contextlib.contextmanager
def _named_errors(storage: Storage) -> Iterator[None]:
    """Turn what a local file system says into a UserError; stores' failures are the caller's, who may try again."""
    try:
        yield
    except OSError as error:
        if not storage.is_local:
            raise
        where = error.filename or storage.describe(layout.MANIFESTS)
        remedy = "Mend its permissions." if isinstance(error, PermissionError) else MEND
        raise UserError(f"{where} cannot be read ({error.strerror or error}). {remedy}") from error


def read_description(raw: bytes, where: str) -> Description:
    """The contents of dataset.json, checked; raises UserError, which calls the file ``where``."""
    try:
        version = msgspec.json.decode(raw, type=dict[str, Any]).get("format_version")
        if version not in READABLE:
            raise UserError(
                f"{where} is of format version {str(version)[:40]}; this program reads versions "
                f"{' and '.join(str(one) for one in READABLE)}. Prep the dataset again with this version."
            )
        description = msgspec.json.decode(raw, type=Description)
        if description.background != len(description.classes):
            raise msgspec.ValidationError("background is not the number of classes")
        _check_totals(description, check_options(description.options, where))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({str(error)[:200]}). Prep the dataset again.") from error
    return description


def _shard_rows(table: pa.Table) -> tuple[ShardRow, ...]:
    """The rows of shards.parquet; raises DamagedTable for what prep does not write."""
    crops, size, part = (table.column(name).to_numpy() for name in ("crops", "bytes", "part"))
    good = (part >= 0) & (crops >= 1) & (crops <= MOST_CROPS) & (size <= MOST_SHARD_BYTES)
    good &= crops * LEAST_BYTES <= size
    if not good.all():
        raise DamagedTable(f"is damaged: row {int(np.argmin(good)):,} has an impossible part, crops or bytes")
    if pc.all(pc.match_substring_regex(table.column("sha256"), r"\A[0-9a-f]{64}\z")).as_py() not in (True, None):
        raise DamagedTable("is damaged: a sha256 is not 64 hexadecimal digits")
    if table.num_rows > 3 * layout.MOST_PARTS:
        raise DamagedTable(f"is damaged: it has {table.num_rows:,} shards")
    shards = tuple(ShardRow(index, **row) for index, row in enumerate(table.to_pylist()))
    for shard in shards:
        # A name leads to a file: it is the one that layout gives, or none.
        if shard.group not in GROUPS or shard.name != layout.shard_name(shard.group, shard.part):
            raise DamagedTable(f"is damaged: row {shard.index:,} does not have its shard's name")
    if len({shard.name for shard in shards}) < len(shards):
        raise DamagedTable("is damaged: a shard is listed twice")
    return shards


def memory_file(raw: bytes) -> Any:
    """A readable file over bytes, as pyarrow wants it."""
    return pa.BufferReader(raw)


class CropIndex:
    """The rows of crops.parquet for single shards, one row group at a time, each checked whole.

    Holds the file open (local) or fetched once whole (remote); build it in the process that reads. file: the file, open
    for reading, where the caller has it. Raises UserError, as ``rows`` does.
    """

    COLUMNS = ("key", "label", *schema.EDGES, "offset", "size", *schema.MARGINS)

    def __init__(
        self, dataset: Dataset, options: Mapping[str, Any] | None = None, file: BinaryIO | None = None
    ) -> None:
        storage = Storage(dataset.url, options)
        self._name = storage.describe(layout.CROPS)
        self._background = dataset.description.background
        self._schema = schema.crops_schema(dataset.description.format_version)
        with _named_errors(storage):
            if file is not None:
                source = pa.PythonFile(file, "r")
            elif storage.is_local:
                source = str(storage.regular_file(layout.CROPS))
            else:
                source = memory_file(storage.read(layout.CROPS, dataset.most_index_bytes))
            with self._damage():
                self._file = open_table(source, self._schema)
        if self._file.metadata.num_row_groups != len(dataset.shards):
            raise UserError(
                f"{self._name} has {self._file.metadata.num_row_groups} row groups for {len(dataset.shards)} shards: "
                f"it is of another dataset. {MEND}"
            )

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except DamagedTable as error:
            raise UserError(f"{self._name} {error}. {MEND}") from error

    def table(self, shard: ShardRow) -> pa.Table:
        """All columns of one shard's crops, in member order."""
        with self._damage():
            found = read_group(self._file, self._schema, shard.index, shard.crops, tuple(self._schema.names))
            checked = ("label", "offset", "size", *schema.EDGES, *schema.MARGINS)
            rows = {name: found.column(name).to_numpy() for name in checked if name in found.column_names}
            check_crops(rows, shard.bytes, self._background)
        return found

    def rows(self, shard: ShardRow, columns: tuple[str, ...] = COLUMNS) -> dict[str, npt.NDArray[Any]]:
        """Columns of one shard's crops in member order, each a numpy array of ``shard.crops`` elements."""
        checked = dict.fromkeys((*columns, "label", "offset", "size", *schema.EDGES, *schema.MARGINS))
        with self._damage():
            table = read_group(self._file, self._schema, shard.index, shard.crops, tuple(checked))
            rows = {name: table.column(name).to_numpy() for name in table.column_names}
            check_crops(rows, shard.bytes, self._background)
        # Members of version 1 are their crops and nothing beyond.
        none = np.zeros(shard.crops, dtype=np.int32)
        return {name: none if name in schema.MARGINS and name not in rows else rows[name] for name in columns}
