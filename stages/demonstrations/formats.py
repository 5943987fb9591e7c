"""Converts a row of a source into a demonstration: the known formats, and the checks.

A row that cannot be used becomes a Reject; reading continues with the next row.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from ...pipeline.errors import UserError, reason
from ...pipeline.format.records import Reject
from .demonstration import Demonstration, Messages, Row, UnusableError
from .message_weights import WEIGHT_KEYS, take_weights
from .sources import Source

T = TypeVar("T")

_FIELDS_NAMED = 12  # in the message about a row of unknown format


def check_readable(sources: Sequence[Source], format: str = "auto") -> None:
    """Raise UserError for a source without a usable demonstration; read up to the first one."""
    for source in sources:
        first: Reject | None = None
        for line, raw in source.rows():
            row = parse_row(source, line, raw, format)
            if not isinstance(row, Reject):
                break
            first = first or row
        else:
            assert first is not None, "an open source has rows"
            raise UserError(
                f"demonstrations {source.origin}: none of its rows could be used; the first: line "
                f"{first.line}: {first.reason}; formats are {', '.join(FORMATS)}, name one with "
                "--format"
            )


def parse_row(source: Source, line: int, raw: Any, format: str) -> Demonstration | Reject:
    """Parse a row of a source; `format` is one of FORMATS, or "auto" to recognise it."""
    try:
        row = _parse(raw) if isinstance(raw, bytes) else raw
        if not isinstance(row, dict):
            raise UnusableError("not an object with fields (a JSON array belongs in a .json file)")
        if format == "auto":
            format = _recognise(row)
        messages = _checked(FORMATS[format].convert(row))
        demonstration = Demonstration(
            id=_row_id(row) or f"{source.name}:{line}",
            weights=take_weights(messages),
            messages=messages,
            tools=_tools(row),
            source=source.name,
            line=line,
        )
        _check_characters(demonstration)
    except UnusableError as error:
        return Reject(source.name, line, reason(error))
    return demonstration


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnusableError(
            f"not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"not JSON: {error}") from error


def _recognise(row: Row) -> str:
    for name, form in FORMATS.items():
        if form.fits(row):
            return name
    some, more = [str(name) for name in islice(row, _FIELDS_NAMED)], len(row) - _FIELDS_NAMED
    fields = ", ".join(some) + (f" and {more:,} more" if more > 0 else "")
    raise UnusableError(f"no known format, the fields are {fields or 'none'}")


def _row_id(row: Row) -> str | None:
    value = row.get("id")
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_id else None


def _tools(row: Row) -> list[Row] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # columns hold schemas of many shapes as JSON
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UnusableError(f"tools is not JSON: {error}") from error
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise UnusableError("tools is not a list of objects")
    return tools or None


def _checked(messages: Messages) -> Messages:
    if not messages:
        raise UnusableError("messages is empty")
    checked = [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise UnusableError("no assistant message")
    return checked


def _checked_message(name: str, message: Any) -> Row:
    if not isinstance(message, dict):
        raise UnusableError(f"{name} is not an object")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise UnusableError(
            f"{name}.role is missing" if role is None else f"{name}.role is not a name"
        )
    calls = role == "assistant" and message.get("tool_calls")
    content = message.setdefault("content", "" if calls else None)
    content = _typed(f"{name}.content", content, str, "a string")
    if role == "assistant" and not calls and not content.strip():
        raise UnusableError(f"{name}.content, the assistant's answer, is empty")
    return message


def _check_characters(demonstration: Demonstration) -> None:
    """Raise UnusableError for half a surrogate pair, which JSON allows and tokenizers fail on."""
    parts = [demonstration.id, demonstration.messages, demonstration.tools]
    try:
        json.dumps(parts, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise UnusableError(f"the text holds half a surrogate pair, \\u{half:04x}") from error


SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _from_messages(row: Row) -> Messages:
    _refuse_weights_beside(row, "messages")
    return _list(row, "messages")


def _from_sharegpt(row: Row) -> Messages:
    _refuse_weights_beside(row, "conversations")
    turns = enumerate(_list(row, "conversations"))
    return _system(row) + [_from_turn(f"conversations[{i}]", turn) for i, turn in turns]


def _from_turn(name: str, turn: Any) -> Row:
    if not isinstance(turn, dict):
        raise UnusableError(f"{name} is not an object")
    speaker = _typed(f"{name}.from", turn.get("from", turn.get("role")), str, "a name")
    if speaker.lower() not in SPEAKERS:
        raise UnusableError(f"{name}.from is {speaker!r}, known are {', '.join(SPEAKERS)}")
    text = _typed(f"{name}.value", turn.get("value", turn.get("content")), str, "a string")
    return _message(SPEAKERS[speaker.lower()], text) | _weights_in(turn)


def _from_alpaca(row: Row) -> Messages:
    question = _string(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _string(row, "input")
    answer = _message("assistant", _string(row, "output")) | _weights_in(row)
    return [*_system(row), _message("user", question), answer]


def _from_prompt_completion(row: Row) -> Messages:
    key = _completion_key(row)
    prompt, completion = _turns(row, "prompt", "user"), _turns(row, key, "assistant")
    if isinstance(row[key], list):
        _refuse_weights_beside(row, key)
    else:
        completion[0] |= _weights_in(row)
    return [*prompt, *completion]


def _turns(row: Row, key: str, role: str) -> Messages:
    is_list = isinstance(row.get(key), list)
    return _list(row, key) if is_list else [_message(role, _string(row, key))]


def _completion_key(row: Row) -> str:
    return "completion" if row.get("completion") is not None else "response"


def _system(row: Row) -> Messages:
    return [_message("system", _string(row, "system"))] if row.get("system") else []


def _message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _weights_in(fields: Row) -> Row:
    return {key: fields[key] for key in WEIGHT_KEYS if fields.get(key) is not None}


def _refuse_weights_beside(row: Row, key: str) -> None:
    """Raise UnusableError for weights outside the messages, as their message is unknown."""
    for name in _weights_in(row):
        raise UnusableError(
            f"{name} stands beside {key}: put it into the assistant's message that it belongs to"
        )


def _list(row: Row, key: str) -> list[Any]:
    return _typed(key, row.get(key), list, "a list")


def _string(row: Row, key: str) -> str:
    return _typed(key, row.get(key), str, "a string")


def _typed(name: str, value: Any, kind: type[T], kind_name: str) -> T:
    """The value, which must be of this type."""
    if not isinstance(value, kind):
        raise UnusableError(f"{name} is {'missing' if value is None else f'not {kind_name}'}")
    return value


class Format(NamedTuple):
    """One format of a row: how it is recognised, and how it is converted."""

    fits: Callable[[Row], bool]
    convert: Callable[[Row], Messages]


def _has(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(field) is not None for field in fields)


FORMATS: Mapping[str, Format] = {  # a row of several formats is read as the first of them
    "messages": Format(_has("messages"), _from_messages),
    "sharegpt": Format(_has("conversations"), _from_sharegpt),
    "alpaca": Format(_has("instruction", "output"), _from_alpaca),
    "prompt-completion": Format(
        lambda row: _has("prompt", _completion_key(row))(row), _from_prompt_completion
    ),
}
