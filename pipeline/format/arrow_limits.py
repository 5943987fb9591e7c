"""Refuses Arrow files whose record batches would take too much memory, before they are read.

Every compressed buffer of a record batch states its decompressed size, and pyarrow allocates that
much memory without a check. These sizes are read here from the tables of the file (flatbuffers: the
footer lists the record batches, the head of each lists its buffers), which pyarrow does not expose.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

MOST_RATIO = 100  # of decompressed to stored bytes; targets of real text stay below 20
MOST_DECODED = 2**31  # bytes of a record batch, all values taken as 8 bytes wide
ALWAYS_ALLOWED = 8 * 2**20  # bytes of a record batch, whatever the ratio
_MOST_HEAD = 2**20  # bytes of a head; a hundred buffers take a few thousand
_MAGIC = b"ARROW1"
_CONTINUES = b"\xff\xff\xff\xff"
_IS_DICTIONARY, _IS_BATCH = 2, 3  # types of messages
_NOT_COMPRESSED = -1
_BLOCK = np.dtype([("offset", "<i8"), ("head", "<i4"), ("_", "<i4"), ("body", "<i8")])
_NODE = np.dtype([("length", "<i8"), ("nulls", "<i8")])
_BUFFER = np.dtype([("offset", "<i8"), ("size", "<i8")])

# numbers of fields in Arrow's File.fbs and Message.fbs
_FOOTER_DICTIONARIES, _FOOTER_BATCHES = 2, 3
_MESSAGE_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY = 1, 2, 3
_DICTIONARY_DATA = 1
_BATCH_NODES, _BATCH_BUFFERS, _BATCH_COMPRESSION = 1, 2, 3


def refuse_bombs(file: pa.NativeFile, is_shard: bool = True) -> None:
    """Raise ArrowInvalid for an Arrow file with damaged tables or oversized batches.

    Checks nothing else. A shard has no dictionaries, and all of its values are decoded.
    """
    with _damage_named():
        dictionaries, batches = _blocks(file)
        if is_shard and dictionaries:
            raise pa.ArrowInvalid("it holds dictionaries, unlike any shard")
        for offset, head_size in [*dictionaries, *batches]:
            _refuse_bomb(file, offset, head_size, is_shard)


def refuse_stream_bombs(file: pa.NativeFile) -> None:
    """As `refuse_bombs`, for the stream format of files that are not shards."""
    with _damage_named():
        offset, end = 0, file.size()
        while offset + 8 <= end:
            is_new = _read(file, offset, 4) == _CONTINUES  # older versions begin with the size
            (size,) = struct.unpack("<i", _read(file, offset + 4 * is_new, 4))
            if size == 0:
                return
            head_size = size + 4 + 4 * is_new
            offset += head_size + _refuse_bomb(file, offset, head_size, False)


@contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid:
        raise
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise pa.ArrowInvalid(f"its tables are damaged ({error})") from error


def _blocks(file: pa.NativeFile) -> list[list[tuple[int, int]]]:
    """The offset and the size of the head of each dictionary, and of each record batch."""
    end = file.size() - len(_MAGIC) - 4
    tail = _read(file, end, 4 + len(_MAGIC))
    if tail[4:] != _MAGIC:
        raise pa.ArrowInvalid("it does not end as an Arrow file")
    (size,) = struct.unpack_from("<i", tail)
    footer = _read(file, end - size, size)
    root = _follow(footer, 0)
    fields = (_FOOTER_DICTIONARIES, _FOOTER_BATCHES)
    found = [_vector(footer, root, field, _BLOCK) for field in fields]
    return [
        list(zip(each["offset"].tolist(), each["head"].tolist(), strict=True)) for each in found
    ]


def _refuse_bomb(file: pa.NativeFile, offset: int, head_size: int, is_shard: bool) -> int:
    """The size of a message's body, if it may be read."""
    if head_size > _MOST_HEAD:
        raise pa.ArrowInvalid(f"the head of a record batch has {head_size:,} bytes")
    head = _read(file, offset, head_size)
    head = head[8 if head[:4] == _CONTINUES else 4 :]
    message = _follow(head, 0)
    body_field = _field(head, message, _MESSAGE_BODY)
    body_size = struct.unpack_from("<q", head, body_field)[0] if body_field else 0
    start = offset + head_size
    if not 0 <= body_size <= file.size() - start:
        raise pa.ArrowInvalid(f"a record batch of {body_size:,} bytes exceeds the file")
    batch = _batch(head, message)
    if batch is None:
        return body_size
    is_packed = _field(head, batch, _BATCH_COMPRESSION) is not None
    decoded = 8 * sum(map(abs, _vector(head, batch, _BATCH_NODES, _NODE)["length"].tolist()))
    if (is_packed or is_shard) and decoded > MOST_DECODED:
        raise pa.ArrowInvalid(f"a record batch of {body_size:,} bytes decodes to {decoded:,}")
    unpacked = 0
    for place, size in _vector(head, batch, _BATCH_BUFFERS, _BUFFER).tolist() if is_packed else ():
        if size > 0:
            (declared,) = struct.unpack("<q", _read(file, start + place, 8))
            unpacked += size if declared == _NOT_COMPRESSED else abs(declared)
    if unpacked > min(MOST_DECODED, max(ALWAYS_ALLOWED, MOST_RATIO * body_size)):
        raise pa.ArrowInvalid(f"a record batch of {body_size:,} bytes unpacks to {unpacked:,}")
    return body_size


def _batch(head: bytes, message: int) -> int | None:
    """The table of a message's record batch, or of its dictionary's; None for other messages."""
    kind, header = _field(head, message, _MESSAGE_TYPE), _field(head, message, _MESSAGE_HEADER)
    if kind is None or header is None or head[kind] not in (_IS_DICTIONARY, _IS_BATCH):
        return None
    table = _follow(head, header)
    if head[kind] == _IS_BATCH:
        return table
    data = _field(head, table, _DICTIONARY_DATA)
    return None if data is None else _follow(head, data)


def _read(file: pa.NativeFile, offset: int, size: int) -> bytes:
    if not (offset >= 0 and 0 <= size <= file.size() - offset):
        raise pa.ArrowInvalid(f"it ends before byte {offset + size:,}")
    return file.read_at(size, offset)


def _follow(data: bytes, place: int) -> int:
    return place + struct.unpack_from("<I", data, place)[0]


def _field(data: bytes, table: int, number: int) -> int | None:
    """The place of a field of a table; None if it is absent."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, fields)
    entry = 4 + 2 * number
    shift = struct.unpack_from("<H", data, fields + entry)[0] if entry < size else 0
    return table + shift if shift else None


def _vector(data: bytes, table: int, number: int, dtype: np.dtype) -> np.ndarray:
    """The structs in a field of a table."""
    field = _field(data, table, number)
    if field is None:
        return np.empty(0, dtype)
    start = _follow(data, field)
    (count,) = struct.unpack_from("<I", data, start)
    return np.frombuffer(data, dtype, count, start + 4)
