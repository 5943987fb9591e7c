"""The interface of readers."""

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

LONGEST_LINE = 1 << 25  # bytes; a conversation of a million tokens takes a fifth
TOO_LONG: Final = object()  # in place of a row that is longer than a line may be
# line or row number from 1, and content: bytes are unparsed JSON
Lines = Iterator[tuple[int, Any]]
Version = tuple[int, ...] | None  # of a file; None if it is missing, or not a file


class Reader(NamedTuple):
    """The functions that read one kind of source."""

    rows: Callable[[int], Lines]
    facts: Callable[[], tuple[str, int | None]]  # fingerprint and count
    finds_rows: bool = False  # whether a row can be read without the rows before it
    version: Callable[[], Version] = lambda: None


def without_nones(value: Any) -> Any:
    """A value without its None fields: in a column of structs each row has the fields of all."""
    if isinstance(value, dict):
        return {key: without_nones(field) for key, field in value.items() if field is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value
