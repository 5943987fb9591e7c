"""What a reader is, whatever it reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ....pipeline.errors import UserError, one_line

# a line or row from 1, and what it holds: bytes are JSON to be read
Lines = Iterator[tuple[int, Any]]
Version = tuple[int, ...] | None  # of a file; None where it is not there, or is none


class Reader(NamedTuple):
    """How a kind of source is read."""

    rows: Callable[[int], Lines]
    facts: Callable[[], tuple[str, int | None]]  # fingerprint and count
    finds_rows: bool = False
    version: Callable[[], Version] = lambda: None


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Turns what the libraries raise about a damaged or unreachable source into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zlib, zstd, Arrow and the hub each have their own
        raise UserError(f"demonstrations {origin}: cannot be read: {one_line(error)}") from error


def without_nones(value: Any) -> Any:
    """A value without its absent fields: a column of structs has those of all rows in each row."""
    if isinstance(value, dict):
        return {key: without_nones(field) for key, field in value.items() if field is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value
