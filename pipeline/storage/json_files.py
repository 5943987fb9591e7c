"""Canonical JSON: the same bytes for the same value, parsed within bounds."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from ..errors import UserError, one_line
from .files import MOST_BYTES, read_bytes, write_bytes

Kind = TypeVar("Kind")

MOST_DENSE = 100_000  # values that a JSON file of any size may hold
_MOST = sys.float_info.max
Number = (  # finite
    Annotated[float, msgspec.Meta(ge=-_MOST, le=_MOST)]
    | Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
)
_HALF_PAIR = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F]")  # an escaped surrogate


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, json_bytes(value))


def write_readable(path: Path, content: bytes) -> None:
    """Write a JSON file atomically. Raises UserError if it would be too large to read back."""
    refuse_unreadable(path, content)
    write_bytes(path, content)


def refuse_unreadable(path: Path, content: bytes) -> None:
    """Raise UserError for the content of a JSON file that would be too large to read back."""
    if excess := _excess(content):
        raise UserError(
            f"{path}: would have {excess}, more than is read back: remove the rows that cannot be "
            "used, or give another --shard-size"
        )


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file, the same bytes for the same value; structs become dicts."""
    text = json.dumps(
        value,
        indent=1,
        sort_keys=True,
        ensure_ascii=False,
        allow_nan=False,
        default=msgspec.structs.asdict,
    )
    return text.encode() + b"\n"


def sealed_bytes(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file with a hash of all its values, its seal."""
    return json_bytes({**value, "seal": sha256_of_json(value)})


def read_sealed(path: Path, kind: type[Kind], what: str, way_out: str) -> Kind:
    """Read a sealed JSON file as a `kind`. Raises UserError if it is damaged or was changed."""
    content = read_bytes(path)
    try:
        value = parse_json(path, content)
    except UserError as error:
        raise UserError(f"{error}: {way_out}") from error
    with refuse_misfits(path, what, way_out):
        value = msgspec.convert(value, dict[str, Any])
        value.pop("seal", None)
        found = msgspec.convert(value, kind)
        resealed = sealed_bytes(value)  # a ValueError for NaN or half a character
    if resealed != content:
        raise UserError(
            f"{path}: damaged or changed, its seal does not match its content: {way_out}"
        )
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file that this package wrote."""
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, content: bytes) -> Any:
    """Parse the content of a JSON file. Raises UserError if it exceeds the bounds."""
    if excess := _excess(content):
        raise UserError(f"{path}: damaged, it has {excess}, more than qpipe writes")
    if b"\\u" in content and _HALF_PAIR.search(content):  # qpipe writes every character unescaped
        raise UserError(f"{path}: damaged, not JSON that qpipe writes (half a character)")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from error


@contextmanager
def refuse_misfits(path: Path, what: str, way_out: str) -> Iterator[None]:
    """Raise UserError, naming the field, if the block finds that the file is not a `what`."""
    try:
        yield
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not a {what} ({one_line(error)}): {way_out}") from error


def _excess(content: bytes) -> str | None:
    """The size of a JSON file that exceeds the bounds, in words; else None."""
    size = len(content)
    # empty lists take 20 times their text in memory; qpipe writes one value on a line
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
    """Whether a value from a file is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= _MOST
