"""The interface of readers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ....pipeline.errors import UserError, one_line

# line or row number from 1, and content: bytes are unparsed JSON
Lines = Iterator[tuple[int, Any]]
Version = tuple[int, ...] | None  # of a file; None if it is missing, or not a file


class Reader(NamedTuple):
    """The functions that read one kind of source."""

    rows: Callable[[int], Lines]
    facts: Callable[[], tuple[str, int | None]]  # fingerprint and count
    finds_rows: bool = False
    version: Callable[[], Version] = lambda: None


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Convert what libraries raise for a damaged or unreachable source into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zlib, zstd, Arrow and the hub raise different kinds
        raise UserError(f"demonstrations {origin}: cannot be read: {one_line(error)}") from error


def without_nones(value: Any) -> Any:
    """A value without its None fields: in a column of structs each row has the fields of all."""
    if isinstance(value, dict):
        return {key: without_nones(field) for key, field in value.items() if field is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value
