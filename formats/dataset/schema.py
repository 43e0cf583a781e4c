"""The Parquet tables of ``OUT/manifests``: their columns, and how they are written.

``crops.parquet`` has one row per crop, sorted by shard, and one row group per shard in shards.parquet's order, so that
it is the shards' index as well: row group ``i`` belongs to row ``i`` of ``shards.parquet`` and its rows stand in the
order of the shard's members. Reading one row group of 4,000 crops takes about 3 ms.
manifests/README.md defines every column in words; a change of a schema is a change of dataset.FORMAT_VERSION.
"""

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

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


def read_rows(raw: bytes, columns: list[str] | None = None) -> pa.Table:
    """A whole table of a Parquet file's bytes.

    Read on the calling thread: one of Arrow's own may still hold the bytes when the interpreter ends, which aborts it.
    """
    return pq.ParquetFile(pa.BufferReader(raw)).read(columns=columns, use_threads=False)
