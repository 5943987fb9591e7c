"""`--columns`: names the fields of rows in a form of their own.

A field is given as NAME=FIELD. FIELD may lie within others: `data.turns`, `answers.0`.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from ...pipeline.errors import UserError
from .demonstration import Row, UnusableError
from .messages import value_of
from .readers.reader import Lines

TARGETS = ("prompt", "completion", "reasoning", "system", "messages", "tools", "id")
HINT = "name them, as in --columns prompt=question completion=answer, or --columns messages=chat"
NEEDED = {"prompt", "completion", "messages"}
_FIELDS_NAMED = 12  # in a message
_LOOKED_AT = 100  # rows of a source


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """The field for each name. Raises UserError for what is not NAME=FIELD."""
    columns: dict[str, str] = {}
    for each in given:
        name, equals, field = each.partition("=")
        if name not in TARGETS or not equals or not field:
            raise UserError(
                f"--columns {each}: give NAME=FIELD, where NAME is one of {', '.join(TARGETS)}"
            )
        if name in columns:
            raise UserError(f"--columns {each}: {name} is given twice")
        columns[name] = field
    has_messages, has_parts = "messages" in columns, {"prompt", "completion"} <= columns.keys()
    if columns and has_messages == has_parts:
        raise UserError(f"--columns {' '.join(given)}: give messages, or prompt and completion")
    return columns


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """A row with the named fields only, under the names that qpipe knows."""
    kept = {key: row[key] for key in ("id", "tools", "chat_template_kwargs") if key in row}
    found = {name: _at(row, field) for name, field in columns.items()}
    for name in NEEDED & found.keys():
        if found[name] is None:
            field = columns[name]
            raise UnusableError(
                f"no field {field} (--columns {name}={field}), the fields are {fields_of(row)}"
            )
    return kept | {name: value for name, value in found.items() if value is not None}


def refuse_unknown(origin: str, rows: Lines, columns: Mapping[str, str]) -> None:
    """Raise UserError for a column that none of the first rows has: it may be misspelt."""
    missing = dict(columns)
    for _, raw in islice(rows, _LOOKED_AT) if columns else ():
        with suppress(UnusableError):
            row = value_of(raw)
            if isinstance(row, dict):
                missing = {name: each for name, each in missing.items() if _at(row, each) is None}
        if not missing:
            return
    for name, field in missing.items():
        raise UserError(
            f"demonstrations {origin}: none of its first rows has the field {field} of --columns "
            f"{name}={field}: name a field that they have"
        )


def _at(row: Row, field: str) -> Any:
    """The value of a field; None if the row has none."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def fields_of(row: Row) -> str:
    """The names of a row's fields, for a message."""
    some, more = [str(name) for name in islice(row, _FIELDS_NAMED)], len(row) - _FIELDS_NAMED
    return (", ".join(some) + (f" and {more:,} more" if more > 0 else "")) or "none"
