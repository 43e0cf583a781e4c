"""What a column's pages become is known before it is read, whatever the footer claims."""

import contextlib
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jigsaw_pretrain.formats.dataset import schema
from jigsaw_pretrain.formats.dataset.pages import page_sizes

ROW = st.tuples(st.text("abc\0é", max_size=300), st.integers(-(2**62), 2**62), st.floats())
ROWS = st.lists(ROW, min_size=1, max_size=200)


@given(
    ROWS,
    st.sampled_from(["zstd", "snappy", "gzip", "none"]),
    st.sampled_from(["1.0", "2.0"]),
    st.integers(1, 2000),
    st.booleans(),
)
def test_the_pages_and_their_headers_fill_the_column(
    rows: list[tuple[str, int, float]], codec: str, version: str, page: int, dictionary: bool
) -> None:
    sink = io.BytesIO()
    columns = {name: [row[place] for row in rows] for place, name in enumerate(("text", "number", "share"))}
    pq.write_table(
        pa.table(columns, schema=pa.schema({"text": pa.string(), "number": pa.int64(), "share": pa.float64()})),
        sink,
        compression=codec,
        data_page_version=version,
        data_page_size=page,
        use_dictionary=dictionary,
    )
    source = pa.BufferReader(sink.getvalue())
    metadata = pq.ParquetFile(source).metadata
    for group in range(metadata.num_row_groups):
        for place in range(3):
            column = metadata.row_group(group).column(place)
            sizes = list(page_sizes(source, column))
            headers = column.total_uncompressed_size - sum(sizes)
            assert sizes and 8 * len(sizes) <= headers <= 900 * len(sizes)


def varint(number: int, length: int = 0) -> bytes:
    """A number as Thrift writes it, in at least so many bytes."""
    found = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    found += [0] * (length - len(found))
    return bytes([*(one | 128 for one in found[:-1]), found[-1]])


def test_a_footer_that_belittles_a_column_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MOST_TEXT", 1 << 20)
    row = {"name": ["x"], "group": ["S"], "part": [0], "crops": [1], "bytes": [1024], "sha256": ["0" * (4 << 20)]}
    sink = io.BytesIO()
    pq.write_table(pa.table(row, schema=schema.SHARDS), sink, compression="zstd", store_schema=False)
    raw = bytearray(sink.getvalue())
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    true = varint(2 * pq.read_metadata(pa.BufferReader(raw)).row_group(0).column(5).total_uncompressed_size)
    place = raw.index(true, footer)
    raw[place : place + len(true)] = varint(2 * 1000, len(true))
    assert pq.read_metadata(pa.BufferReader(raw)).row_group(0).column(5).total_uncompressed_size == 1000
    with pytest.raises(schema.DamagedTable, match="or pages without rows"):
        schema.read_table(bytes(raw), schema.SHARDS)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_header_or_an_error(data: bytes) -> None:
    class Column:
        has_dictionary_page, dictionary_page_offset, data_page_offset = False, None, 0
        total_compressed_size = len(data)

    with contextlib.suppress(ValueError):
        list(page_sizes(pa.BufferReader(data), Column()))
