"""What the pages of a Parquet column become in memory, by the pages' own headers.

A reader makes room for what a page's header says and fills it: the footer's sizes are what a writer claims, and 30 KB
may become gigabytes. So each header is read before the column is. Headers are structs of Thrift's compact protocol, of
which pyarrow shows nothing. Costs a read of 16 KB per page and column, some ten microseconds.
"""

from collections.abc import Iterator
from typing import Any

MOST_HEADER = 1 << 14
"""The most bytes of a page's header; the statistics in it are at most two values of 4 KB."""

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
_VARINTS = (4, 5, 6)
_FIXED = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}
_MOST_NESTED = 8


def page_sizes(source: Any, column: Any) -> Iterator[int]:
    """The bytes that each page of a column chunk has once it is decompressed.

    Args:
        source: the file, of pyarrow's kind (``read_at``).
        column: the chunk's metadata.

    Raises:
        ValueError: for what is no page.
    """
    place = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        place = min(place, column.dictionary_page_offset)
    end = place + column.total_compressed_size
    while place < end:
        header = _Header(source.read_at(min(MOST_HEADER, end - place), place))
        fields = header.struct()
        whole, held = fields.get(2), fields.get(3)
        if not isinstance(whole, int) or not isinstance(held, int) or whole < 0 or held < 0:
            raise ValueError("a page's header does not say how large the page is")
        yield whole
        place += header.place + held


class _Header:
    """Reads a struct of Thrift's compact protocol; raises ValueError where the bytes are none."""

    def __init__(self, data: bytes) -> None:
        self._data, self.place = data, 0

    def struct(self, depth: int = 0) -> dict[int, int | None]:
        """The struct's whole numbers by field; None of what is no number."""
        if depth > _MOST_NESTED:
            raise ValueError("a page's header is nested too deeply")
        found: dict[int, int | None] = {}
        field = 0
        while byte := self._take(1)[0]:
            field = field + (byte >> 4) if byte >> 4 else self._signed()
            found[field] = self._value(byte & 15, depth)
        return found

    def _value(self, kind: int, depth: int, alone: bool = True) -> int | None:
        if kind in (_TRUE, _FALSE):
            # A field's type is its value; in a list each has a byte.
            self._take(0 if alone else 1)
        elif kind in _VARINTS:
            return self._signed()
        elif kind in _FIXED:
            self._take(_FIXED[kind])
        elif kind == _BINARY:
            self._take(self._varint())
        elif kind in (_LIST, _SET):
            byte = self._take(1)[0]
            self._values((byte & 15,), byte >> 4 if byte >> 4 < 15 else self._varint(), depth)
        elif kind == _MAP:
            if count := self._varint():
                byte = self._take(1)[0]
                self._values((byte >> 4, byte & 15), count, depth)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise ValueError("a page's header is damaged")
        return None

    def _values(self, kinds: tuple[int, ...], count: int, depth: int) -> None:
        for _ in range(min(count, MOST_HEADER)):
            for kind in kinds:
                self._value(kind, depth + 1, alone=False)

    def _take(self, count: int) -> bytes:
        taken = self._data[self.place : self.place + count]
        if len(taken) < count:
            raise ValueError("a page's header is cut short or too long")
        self.place += count
        return taken

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page's header has a number without end")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
