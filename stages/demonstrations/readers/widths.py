"""The decoded size of the rows of an Arrow array, known before they are decoded.

Dictionaries, run ends and views name one value many times: a small batch may decode to any size.
Sizes are summed from lengths and offsets, without memory for what they stand for.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

VALUE_BYTES = 8.0  # of any value, and in addition to its text

Sizes = NDArray[np.floating[Any]]  # which do not overflow
Places = NDArray[np.int64]


def row_bytes(batch: pa.RecordBatch) -> Sizes:
    """The decoded bytes of each row of a batch, [N].

    Raises ValueError for a column of a type that is not read.
    """
    edges = np.arange(batch.num_rows + 1, dtype=np.int64)
    columns = (_bytes_before(column, edges) for column in batch.columns)
    return np.diff(sum(columns, 0.0 * edges))


def _bytes_before(array: pa.Array, edges: Places) -> Sizes:
    """The decoded bytes of the elements before each of these places in an array."""
    kind, values = array.type, VALUE_BYTES * edges
    if isinstance(array, pa.ExtensionArray):
        return _bytes_before(array.storage, edges)
    if pa.types.is_struct(kind):
        children = (array.field(i) for i in range(kind.num_fields))
        return values + sum(_bytes_before(child, edges) for child in children)
    if pa.types.is_map(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        children = [array.keys, array.items] if pa.types.is_map(kind) else [array.values]
        places = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)[edges]
        return values + sum(_bytes_before(child, places) for child in children)
    if pa.types.is_fixed_size_list(kind):
        return values + _bytes_before(array.values, (array.offset + edges) * kind.list_size)
    if pa.types.is_dictionary(kind):
        return values + _bytes_named(array)[edges]
    if kind in (pa.string_view(), pa.binary_view()):
        return values + _summed(_view_lengths(array))[edges]
    if kind in (pa.string(), pa.binary()):
        return values + _offsets(array, np.int32)[edges]
    if kind in (pa.large_string(), pa.large_binary()):
        return values + _offsets(array, np.int64)[edges]
    if kind.num_fields == 0 and (pa.types.is_null(kind) or _has_width(kind)):
        return values + (kind.byte_width if pa.types.is_fixed_size_binary(kind) else 0) * edges
    raise ValueError(f"a column of type {kind} is not read")


def _bytes_named(array: pa.DictionaryArray) -> Sizes:
    """The bytes before each element of an array of references to values."""
    of_values = np.arange(len(array.dictionary) + 1, dtype=np.int64)
    lengths = np.append(np.diff(_bytes_before(array.dictionary, of_values)), 0.0)
    return _summed(lengths[array.indices.fill_null(len(lengths) - 1).to_numpy()])


def _view_lengths(array: pa.Array) -> Places:
    """The lengths of the texts that views point to; each view has 16 bytes, its length first."""
    (_, views, *_) = array.buffers()
    lengths = np.frombuffer(views, "<i4")[::4][array.offset :][: len(array)]
    return np.where(array.is_valid().to_numpy(zero_copy_only=False), lengths, 0).astype(np.int64)


def _offsets(array: pa.Array, dtype: type) -> Places:
    """Where each text begins among the texts of its array, and where the last ends."""
    (_, offsets, _) = array.buffers()
    if offsets is None or not offsets.size:  # an empty array may lack them
        return np.zeros(len(array) + 1, np.int64)
    places = np.frombuffer(offsets, dtype)[array.offset :][: len(array) + 1]
    return places.astype(np.int64)


def _summed(lengths: Places | Sizes) -> Sizes:
    return np.concatenate([np.zeros(1), np.cumsum(lengths, dtype=np.float64)])


def _has_width(kind: pa.DataType) -> bool:
    try:
        return kind.bit_width > 0
    except ValueError:
        return False
