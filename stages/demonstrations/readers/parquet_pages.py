"""Refuses Parquet files whose pages would take too much memory, before they are decompressed.

The head of each page states its decompressed size and its number of values, and pyarrow sets memory
aside for them without a check. The heads are read here from the file (Thrift's compact protocol),
which pyarrow does not expose. What they state limits what a page expands to.
"""

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow.parquet import RowGroupMetaData

MOST_OF_PAGE = 1 << 28  # bytes; writers aim at one MiB, but a page may hold a thousand long texts
MOST_RATIO, ALWAYS_ALLOWED = 100, 1 << 26  # of the bytes of a page to the stored ones; bytes
MOST_VALUES = 1 << 25  # of a page; a row group usually has a million rows
_MOST_HEAD = 1 << 16  # bytes; a head may hold the smallest and the largest value

# numbers of fields in parquet.thrift
_SIZE, _STORED = 2, 3
_HEADS = (5, 7, 8)  # data page, dictionary page, data page v2: the number of values comes first
_ENCODING = {5: 2, 8: 4}
_DELTA_TEXTS = 7  # each text repeats a part of the one before it


def refuse_page_bombs(path: Path, group: "RowGroupMetaData") -> None:
    """Raise ValueError for a row group with damaged or oversized pages. Checks nothing else."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for index in range(group.num_columns):
            column = group.column(index)
            start = column.data_page_offset
            if column.dictionary_page_offset is not None:
                start = min(start, column.dictionary_page_offset)
            end = start + column.total_compressed_size
            while start < end:
                start = _after_page(data, start, column.path_in_schema)


def _after_page(data: mmap.mmap, start: int, name: str) -> int:
    """Where the page ends that starts here, if it may be read."""
    head = data[start : start + _MOST_HEAD] if start >= 0 else b""
    try:
        page, length = _struct(head, 0)
        size, stored = page[_SIZE], page[_STORED]
        number = next(each for each in _HEADS if each in page)
        values, encoding = page[number][1], page[number].get(_ENCODING.get(number))
    except (IndexError, KeyError, StopIteration, RecursionError) as error:
        raise ValueError(f"column {name}: the head of a page is damaged") from error
    most = min(MOST_OF_PAGE, max(ALWAYS_ALLOWED, MOST_RATIO * stored))
    if not (0 <= size <= most and 0 <= values <= MOST_VALUES and stored >= 0):
        raise ValueError(
            f"column {name}: a page of {stored:,} bytes unpacks to {size:,} bytes and {values:,} "
            f"values, above {most:,} or {MOST_VALUES:,}"
        )
    if encoding == _DELTA_TEXTS:
        raise ValueError(
            f"column {name}: encoded as DELTA_BYTE_ARRAY, which can expand without limit: write it "
            "in another encoding"
        )
    return start + length + stored


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        number, at = (number + (head >> 4), at) if head >> 4 else _zigzag(data, at)
        fields[number], at = _value(data, at, head & 15)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    """A value of this kind, None if it is of no use here, and where it ends."""
    match kind:
        case 1 | 2:  # true and false, which have no bytes of their own
            return None, at
        case 3:
            return None, at + 1
        case 4 | 5 | 6:
            return _zigzag(data, at)
        case 7:
            return None, at + 8
        case 8:
            length, at = _unsigned(data, at)
            return None, at + length
        case 12:
            return _struct(data, at)
    raise KeyError(kind)  # heads of pages have no lists or maps


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
