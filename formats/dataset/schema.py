"""The Parquet tables of ``OUT/manifests``: their columns, and how they are written.

``crops.parquet`` has one row per crop, sorted by shard, and one row group per shard in shards.parquet's order, so that
it is the shards' index as well: row group ``i`` belongs to row ``i`` of ``shards.parquet`` and its rows stand in the
order of the shard's members. Reading one row group of 4,000 crops takes about 3 ms.
manifests/README.md defines every column in words; a change of a schema is a change of dataset.FORMAT_VERSION.

What is read may come from a stranger, so it is checked whole before anything is computed from it: the columns and their
types, the rows a group may have (a few bytes of Parquet can claim billions), nulls, texts, and each value's range
(``check_crops``). That is vectorised, and costs 0.2 ms for 4,000 crops.
"""

import errno
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jigsaw_pretrain.formats.boxes import FARTHEST
from jigsaw_pretrain.formats.dataset.pages import page_sizes
from jigsaw_pretrain.formats.pixels import MAX_PIXELS

CROPS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image_file", pa.string(), nullable=False),
        pa.field("annotation_id", pa.int64()),
        pa.field("ordinal", pa.int32(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("left", pa.int32(), nullable=False),
        pa.field("top", pa.int32(), nullable=False),
        pa.field("right", pa.int32(), nullable=False),
        pa.field("bottom", pa.int32(), nullable=False),
        pa.field("box_x", pa.float64()),
        pa.field("box_y", pa.float64()),
        pa.field("box_width", pa.float64()),
        pa.field("box_height", pa.float64()),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)

EDGES = ("left", "top", "right", "bottom")
"""The crop of a row, in pixels of its image."""

BOX = ("box_x", "box_y", "box_width", "box_height")
"""The ground-truth box of a row; null for background."""

MARGINS = ("margin_left", "margin_top", "margin_right", "margin_bottom")
"""How many pixels a stored member extends beyond its crop on each side; format version 2 has these columns."""

CROPS_WITH_MARGINS = pa.schema([*CROPS, *(pa.field(name, pa.int32(), nullable=False) for name in MARGINS)])

SQL_NAMES = {
    "group": "aspect_group",
    **{name: f"crop_{name}" for name in EDGES},
    "offset": "byte_offset",
    "size": "byte_size",
}
"""What columns of crops.parquet whose names are words of SQL are called in Dataset.table."""

SHARDS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("crops", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)

SKIPPED = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("image_file", pa.string()),
        pa.field("annotation_id", pa.int64()),
        pa.field("ordinal", pa.int32()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


def crops_schema(format_version: int) -> pa.Schema:
    """The columns of crops.parquet in a dataset of that format version."""
    return CROPS if format_version == 1 else CROPS_WITH_MARGINS


def table_bytes(schema: pa.Schema, row_groups: Iterable[pa.Table]) -> bytes:
    """A Parquet file with one row group per table, in order; empty tables give none.

    The bytes depend on the rows and pyarrow's version alone.
    """
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_statistics=True, store_schema=False) as writer:
        for table in row_groups:
            if table.num_rows:
                writer.write_table(table.cast(schema), row_group_size=table.num_rows)
    return sink.getvalue()


MOST_ROWS = 20_000_000
"""The most rows of a table that is read at once."""

MOST_TABLE_BYTES = 1 << 31
"""The most that the file of such a table may have."""

MOST_TEXT = 1 << 28
"""The most bytes of text that the rows of a column may hold when they are read at once."""

LONGEST_SIDE = 65_500
"""The longest side of a member in pixels: libjpeg's limit."""

PIXELS_PER_BYTE = 1100
"""The most pixels that a byte of a member may stand for; zlib's best is 1,032."""


class DamagedTable(ValueError):
    """What is wrong with a table, to follow the name of its file."""


@dataclass(frozen=True)
class TableFile:
    """An opened Parquet file, and the file of pyarrow's that it is read from."""

    parquet: pq.ParquetFile
    source: Any

    @property
    def metadata(self) -> pq.FileMetaData:
        """What the file's footer says."""
        return self.parquet.metadata


def open_table(source: Any, schema: pa.Schema) -> TableFile:
    """A Parquet file (a path or a file of pyarrow's) that has the columns of ``schema``; raises DamagedTable."""
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    try:
        if isinstance(source, str):
            source = pa.OSFile(source)
        # Texts stay in their dictionaries until their length is known.
        file = pq.ParquetFile(source, read_dictionary=texts)
        found = file.schema_arrow
        names = found.names
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise _damaged(error) from error
    for field in schema:
        if names.count(field.name) != 1:
            raise DamagedTable(f"is damaged: it has {names.count(field.name)} columns {field.name}")
        kind = found.field(field.name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind != field.type:
            raise DamagedTable(f"is damaged: column {field.name} is of type {kind}, not {field.type}")
    return TableFile(file, source)


def read_group(
    file: TableFile, schema: pa.Schema, index: int, rows: int | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """A row group of exactly ``rows`` rows (None: at most MOST_ROWS) in the types of ``schema``; raises DamagedTable.

    Read on the calling thread: one of Arrow's own may still hold the bytes when the interpreter ends, which aborts it.
    """
    wanted = [name for name in (columns or schema.names) if name in schema.names]
    try:
        held = file.metadata.row_group(index).num_rows
        if (held > MOST_ROWS) if rows is None else (held != rows):
            due = f"at most {MOST_ROWS:,}" if rows is None else f"{rows:,}"
            raise DamagedTable(f"is damaged: row group {index} has {held:,} rows where {due} are due")
        _check_room(file, index, wanted)
        table = file.parquet.read_row_group(index, columns=wanted, use_threads=False)
        if table.num_rows != held:
            raise DamagedTable(f"is damaged: row group {index} has fewer rows than it says")
        plain = {name: _plain(table.column(name), schema.field(name)) for name in wanted}
        return pa.table(plain, schema=pa.schema([schema.field(name) for name in wanted]))
    except DamagedTable:
        raise
    except Exception as error:
        raise _damaged(error) from error


def _check_room(file: TableFile, index: int, wanted: Sequence[str]) -> None:
    """Raise DamagedTable for a row group that becomes more than its columns may hold once it is decompressed."""
    group = file.metadata.row_group(index)
    most = MOST_TEXT + 64 * group.num_rows
    for column in (group.column(place) for place in range(group.num_columns)):
        if column.path_in_schema not in wanted:
            continue
        total = 0
        for pages, size in enumerate(page_sizes(file.source, column)):
            total += size
            # A dictionary, and no page without a row.
            if total > most or pages > group.num_rows + 1:
                raise DamagedTable(
                    f"is damaged: column {column.path_in_schema} has more than {most:,} bytes, or pages without rows"
                )


def _plain(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """A column in its own type, checked for nulls and for texts that are no UTF-8 or too long."""
    if column.null_count and not field.nullable:
        raise DamagedTable(f"is damaged: column {field.name} has nulls")
    if not pa.types.is_string(field.type):
        return column
    total = 0
    for chunk in column.chunks:
        words = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        words.validate(full=True)
        lengths = pc.binary_length(words)
        total += pc.sum(lengths.take(chunk.indices) if pa.types.is_dictionary(chunk.type) else lengths).as_py() or 0
    if total > MOST_TEXT:
        raise DamagedTable(f"is damaged: column {field.name} has {total:,} bytes of text")
    return column.cast(field.type)


def _damaged(error: Exception) -> DamagedTable:
    if "Resource temporarily unavailable" in str(error):
        # Of the machine, not of the file: a thread could not be started.
        raise MemoryError("no more threads can be started") from error
    # pyarrow raises many kinds of errors for damaged files.
    words = " ".join(str(error).split())[:150]
    return DamagedTable(f"is damaged ({type(error).__name__}: {words})")


def read_table(raw: bytes, schema: pa.Schema) -> pa.Table:
    """A whole table of a Parquet file's bytes; raises DamagedTable."""
    file = open_table(pa.BufferReader(raw), schema)
    if file.metadata.num_rows > MOST_ROWS:
        raise DamagedTable(f"is damaged: it has {file.metadata.num_rows:,} rows")
    tables = [read_group(file, schema, index) for index in range(file.metadata.num_row_groups)]
    return pa.concat_tables(tables) if tables else schema.empty_table()


Columns = Mapping[str, npt.NDArray[Any]]


def check_crops(rows: Columns, shard_bytes: int, background: int) -> None:
    """Raise DamagedTable where a shard has a row that prep cannot have written.

    Labels are 0 to ``background``, sides 1 to LONGEST_SIDE pixels, members lie within the shard. The columns label,
    offset, size and EDGES are required; MARGINS and BOX are checked where they are there.
    """
    offset, size = rows["offset"].astype(np.int64), rows["size"].astype(np.int64)
    _require(offset, (offset >= 0) & (size >= 1) & (size <= shard_bytes) & (offset <= shard_bytes - size), "offset")
    _require(rows["label"], (rows["label"] >= 0) & (rows["label"] <= background), "label")
    zero = np.zeros(len(offset), dtype=np.int64)
    margins = [rows[name].astype(np.int64) if name in rows else zero for name in MARGINS]
    left, top, right, bottom = (rows[name].astype(np.int64) for name in EDGES)
    outer = left - margins[0], top - margins[1], right + margins[2], bottom + margins[3]
    for margin, name in zip(margins, MARGINS, strict=True):
        _require(margin, (margin >= 0) & (margin <= LONGEST_SIDE), name)
    _require(left, (outer[0] >= 0) & (right > left) & (outer[2] - outer[0] <= LONGEST_SIDE), "left")
    _require(top, (outer[1] >= 0) & (bottom > top) & (outer[3] - outer[1] <= LONGEST_SIDE), "top")
    pixels = (outer[2] - outer[0]) * (outer[3] - outer[1])
    _require(pixels, (pixels <= MAX_PIXELS) & (pixels <= PIXELS_PER_BYTE * size), "number of pixels")
    if BOX[0] in rows:
        x, y, width, height = (rows[name] for name in BOX)
        unknown = np.isnan(x) & np.isnan(y) & np.isnan(width) & np.isnan(height) & (rows["label"] == background)
        with np.errstate(over="ignore", invalid="ignore"):
            fits = (x < outer[2]) & (y < outer[3]) & (x + width > outer[0]) & (y + height > outer[1])
            fits &= (np.abs(x) < FARTHEST) & (np.abs(y) < FARTHEST)
            fits &= (width < FARTHEST) & (height < FARTHEST) & (x + width > x) & (y + height > y)
        _require(x, unknown | fits, BOX[0])


def _require(values: npt.NDArray[Any], good: npt.NDArray[np.bool_], name: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        raise DamagedTable(f"is damaged: row {row:,} of a shard has an impossible {name} ({values[row]})")
