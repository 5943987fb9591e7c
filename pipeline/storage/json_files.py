"""Canonical JSON: written the same for the same value, parsed with bounds."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..errors import UserError, one_line
from .files import MOST_BYTES, read_bytes, write_bytes

MOST_DENSE = 100_000  # values of a JSON file, however short they are
_MOST = sys.float_info.max
Number = (  # finite
    Annotated[float, msgspec.Meta(ge=-_MOST, le=_MOST)]
    | Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
)
_HALF_PAIR = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]")  # escaped


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, json_bytes(value))


def write_readable(path: Path, content: bytes) -> None:
    """Write a JSON file atomically. Raises UserError where it would not be read back."""
    if excess := _excess(content):
        raise UserError(
            f"{path}: would have {excess}, more than is read back: leave rows that cannot be used "
            "out, or give another --shard-size"
        )
    write_bytes(path, content)


def json_bytes(value: Any) -> bytes:
    """A JSON file's content, the same bytes for the same value; a struct is written as a dict."""
    text = json.dumps(
        value,
        indent=1,
        sort_keys=True,
        ensure_ascii=False,
        allow_nan=False,
        default=msgspec.structs.asdict,
    )
    return text.encode() + b"\n"


def read_json(path: Path) -> Any:
    """Read a JSON file that this package wrote."""
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, content: bytes) -> Any:
    """The value in the content of a JSON file."""
    if excess := _excess(content):
        raise UserError(f"{path}: damaged, no file of ours has {excess}")
    if _HALF_PAIR.search(content):  # written as they are, no character needs an escaped pair
        raise UserError(f"{path}: damaged, not JSON of ours (half a character)")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


@contextmanager
def refuse_misfits(path: Path, what: str, way_out: str) -> Iterator[None]:
    """Raises UserError, naming the field, where a value of the file is not one of a `what`."""
    try:
        yield
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not a {what} ({one_line(error)}): {way_out}") from error


def _excess(content: bytes) -> str | None:
    """What is too much in the content of a JSON file."""
    size = len(content)
    # empty lists take 20 times their text in memory; this package writes each value on its line
    values = sum(map(content.count, (b",", b"[", b"{")))
    if values > MOST_DENSE + size // 8:
        return f"{values:,} values in {size:,} bytes"
    return f"{size:,} bytes" if size > MOST_BYTES else None


def sha256_of_json(value: Any) -> str:
    """The hexadecimal SHA-256 of a value's canonical JSON."""
    text = json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        default=msgspec.structs.asdict,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= _MOST
