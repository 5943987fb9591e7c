"""Reads the messages of a row: the many ways to write a turn, and the checks.

Turns are read from role and content, from and value, pairs of names and texts, and lists of texts
that take turns. What a message states and this room does not know is left to the chat template.
"""

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from .demonstration import Messages, Row, UnusableError
from .message_weights import WEIGHT_KEYS
from .readers.reader import LONGEST_LINE, TOO_LONG

T = TypeVar("T")

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
# Names of the two texts in a turn that holds a question and its answer.
SIDES = SPEAKERS | {
    **dict.fromkeys(("input", "question", "prompt"), "user"),
    **dict.fromkeys(("output", "answer", "response"), "assistant"),
}
CALLER = "function_call"  # says the calls of an assistant as JSON
FLAGS = ("train", "training", "trainable", "loss")  # of a message: whether its tokens are trained
_REFUSED = {
    "train_detail": "give spans",
    "training_detail": "give spans",
    "mask": "give weight",
    "masked": "give weight",
}


def list_of_turns(name: str, value: Any) -> Messages:
    """The messages of a list of turns, or of its JSON text."""
    turns = typed(name, from_json(name, value), list, "a list")
    if turns and all(isinstance(turn, str) for turn in turns):
        roles = ("user", "assistant")
        return [message(roles[i % 2], turn) for i, turn in enumerate(turns)]
    return [each for i, turn in enumerate(turns) for each in _of_turn(f"{name}[{i}]", turn)]


def _of_turn(name: str, turn: Any) -> Iterator[Row]:
    """The message of a turn, or the messages of a turn of several speakers."""
    if not isinstance(turn, dict):
        raise UnusableError(f"{name} is not an object")
    turn = {key: value for key, value in turn.items() if value is not None}
    if turn and not {"role", "from"} & turn.keys() and turn.keys() <= SIDES.keys():
        yield from (message(SIDES[key], value) for key, value in turn.items())
        return
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if rest == turn:
        yield turn
        return
    speaker = typed(f"{name}.from", turn.get("from", turn.get("role")), str, "a name").lower()
    text = turn.get("value", turn.get("content"))
    if speaker == CALLER:
        yield {
            **rest,
            "role": "assistant",
            "content": "",
            "tool_calls": calls_of(f"{name}.value", text),
        }
        return
    if speaker not in SPEAKERS:
        raise UnusableError(
            f"{name}.from is {speaker!r}, known are {', '.join(SPEAKERS)}, {CALLER}"
        )
    yield {**rest, "role": SPEAKERS[speaker], "content": content_of(f"{name}.value", text)}


def calls_of(name: str, value: Any) -> list[Row]:
    """Calls given as JSON text or as objects, in OpenAI's form."""
    calls = from_json(name, value)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            raise UnusableError(f"{name} is not a call, an object with a name and arguments")
    return [
        {
            "id": f"call{number:05}",
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments") or {}},
        }
        for number, call in enumerate(calls, 1)
    ]


def checked(messages: Messages) -> Messages:
    """The messages in one form. Raises UnusableError if they are no demonstration."""
    if not messages:
        raise UnusableError("messages is empty")
    messages = [_checked_message(f"messages[{i}]", each) for i, each in enumerate(messages)]
    _name_results(messages)
    answers = [i for i, each in enumerate(messages) if each["role"] == "assistant"]
    if not answers:
        raise UnusableError("no assistant message")
    if all(is_empty(messages[i]) for i in answers):
        raise UnusableError(f"messages[{answers[0]}].content, the assistant's answer, is empty")
    return messages


def _name_results(messages: Messages) -> None:
    """Give results without an id the ids of the calls before them, in their order."""
    ids: list[Any] = []
    for each in messages:
        if each.get("tool_calls"):
            ids = [call["id"] for call in each["tool_calls"] if "id" in call]
        elif each["role"] == "tool" and ids:
            each.setdefault("tool_call_id", ids.pop(0))


def is_empty(answer: Row) -> bool:
    """Whether an assistant's message says nothing: it is shown, but not supervised."""
    return not answer["content"].strip() and not answer.get("tool_calls")


def _checked_message(name: str, given: Any) -> Row:
    if not isinstance(given, dict):
        raise UnusableError(f"{name} is not an object")
    each = {key: value for key, value in given.items() if value is not None}
    role = each.get("role")
    if not isinstance(role, str) or not role:
        raise UnusableError(
            f"{name}.role is missing" if role is None else f"{name}.role is not a name"
        )
    each["role"] = role = SPEAKERS.get(role.lower(), role)
    if "function_call" in each:
        each["tool_calls"] = calls_of(f"{name}.function_call", each.pop("function_call"))
    calls = from_json(f"{name}.tool_calls", each.pop("tool_calls", None) or None)
    if calls:
        each["tool_calls"] = typed(f"{name}.tool_calls", calls, list, "a list")
        for i, call in enumerate(calls):
            typed(f"{name}.tool_calls[{i}]", call, dict, "an object")
    is_call = role == "assistant" and "tool_calls" in each
    each["content"] = content_of(f"{name}.content", each.get("content", "" if is_call else None))
    return _with_flags(name, each)


def _with_flags(name: str, each: Row) -> Row:
    """A message whose flags are a weight: tokens that are not trained have the weight 0."""
    for flag, instead in _REFUSED.items():
        if flag in each:
            raise UnusableError(f"{name}.{flag} is not known: {instead} instead, or leave it out")
    flags = {flag: each.pop(flag) for flag in FLAGS if flag in each}
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise UnusableError(f"{name}.{flag} is not true or false")
        if value and each["role"] != "assistant":
            raise UnusableError(f"{name}.{flag}: only an assistant's message can be trained on")
    if False in flags.values() and each["role"] == "assistant":
        return {key: value for key, value in each.items() if key not in WEIGHT_KEYS} | {"weight": 0}
    return each


def content_of(name: str, value: Any) -> str:
    """A content as one text; parts of the type text are joined."""
    if not isinstance(value, list):
        return typed(name, value, str, "a string")
    return "".join(_text_of(f"{name}[{i}]", part) for i, part in enumerate(value))


def _text_of(name: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise UnusableError(f"{name} is not an object with type and text")
    kind = part.get("type", "text")
    if kind != "text":
        raise UnusableError(f"{name} is of type {kind!r}: only parts of text can be read")
    return typed(f"{name}.text", part.get("text"), str, "a string")


def message(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def from_json(name: str, value: Any) -> Any:
    """A value that may be given as JSON text, as in a column of many shapes."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{name} is not JSON: {error}") from error


def value_of(raw: Any) -> Any:
    """The value of a row as its reader gives it: of a line of JSON, what it says."""
    if raw is TOO_LONG or (isinstance(raw, bytes) and len(raw) > LONGEST_LINE):
        raise UnusableError(f"longer than {LONGEST_LINE:,} bytes, the most of one row")
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnusableError(
            f"not UTF-8: byte {error.start + 1} is {raw[error.start]:#04x}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"not JSON: {error}") from error


def typed(name: str, value: Any, kind: type[T], kind_name: str) -> T:
    """The value, which must be of this type."""
    if not isinstance(value, kind):
        raise UnusableError(f"{name} is {'missing' if value is None else f'not {kind_name}'}")
    return value
