"""Converts a row of a source into a demonstration: the known formats, and what stands beside them.

A row that cannot be used becomes a Reject; reading continues with the next row.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ...pipeline.errors import UserError, reason, shown
from ...pipeline.format.records import Reject
from .columns import HINT, fields_of, refuse_unknown, renamed
from .demonstration import Demonstration, Messages, Row, UnusableError
from .message_weights import WEIGHT_KEYS, take_weights
from .messages import (
    calls_of,
    checked,
    content_of,
    from_json,
    list_of_turns,
    message,
    typed,
    value_of,
)
from .sources import Source

_SYSTEM = ("system", "system_prompt", "system_message")
# Fields beside a question and its answer that say nothing of how to answer.
_ABOUT = {
    *("id", "source", "category", "dataset", "split", "index", "idx", "task", "type", "topic"),
    *("subject", "difficulty", "level", "url", "license", "lang", "language", "model", "created"),
    *("timestamp", "tools", "chat_template_kwargs", "reasoning", *_SYSTEM, *WEIGHT_KEYS),
}
# Arguments of a rendering that are not a row's to give.
_RESERVED = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("tokenize", "continue_final_message", "return_dict", "return_assistant_tokens_mask"),
    *("padding", "truncation", "max_length", "return_tensors", "tokenizer_kwargs", "strftime_now"),
}


def check_readable(
    sources: Sequence[Source], format: str = "auto", columns: Mapping[str, str] | None = None
) -> None:
    """Raise UserError for a source without a usable demonstration; read up to the first one."""
    for source in sources:
        refuse_unknown(source.origin, source.rows(), columns or {})
        first: Reject | None = None
        for line, raw in source.rows():
            row = parse_row(source, line, raw, format, columns)
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


def parse_row(
    source: Source, line: int, raw: Any, format: str, columns: Mapping[str, str] | None = None
) -> Demonstration | Reject:
    """Parse a row of a source; `format` is one of FORMATS, or "auto" to recognise it.

    `columns` are the fields of the row for the names of `columns.TARGETS`.
    """
    try:
        row = value_of(raw)
        if not isinstance(row, dict):
            raise UnusableError("not an object with fields (a JSON array belongs in a .json file)")
        row = renamed(row, columns) if columns else row
        read = FORMATS[_recognise(row) if format == "auto" else format].convert(row)
        read = _with_system(row, read)
        messages = checked(read.messages)
        demonstration = Demonstration(
            id=row_id(row) or f"{source.name}:{line}",
            weights=take_weights(messages),
            messages=messages,
            tools=read.tools or _tools(row),
            source=source.name,
            line=line,
            prompt_length=read.prompt_length,
            template_kwargs=_template_kwargs(row),
        )
        _check_characters(demonstration)
    except UnusableError as error:
        return Reject(source.name, line, reason(error))
    return demonstration


def _recognise(row: Row) -> str:
    for name, form in FORMATS.items():
        if form.fits(row):
            return name
    raise UnusableError(f"no known format, the fields are {fields_of(row)}: {HINT}")


# --- what stands beside the messages


def row_id(row: Row) -> str | None:
    """The id of a row, or None; UnusableError for what is not an id."""
    value = row.get("id")
    if value is None:
        return None
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    if not is_id or not str(value).strip():
        raise UnusableError(f"id is {shown(value)}: give a text or a whole number, or leave it out")
    return str(value)


def _tools(row: Row) -> list[Row] | None:
    tools = from_json(
        "tools", row.get("tools") or None
    )  # columns hold schemas of many shapes as JSON
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise UnusableError("tools is not a list of objects")
    return tools or None


def _template_kwargs(row: Row) -> Row:
    name = "chat_template_kwargs"
    kwargs = typed(name, from_json(name, row.get(name) or {}), dict, "an object")
    for key in _RESERVED & kwargs.keys():
        raise UnusableError(f"{name}.{key} is not an argument of a row's own: leave it out")
    return kwargs


def _with_system(row: Row, read: "Read") -> "Read":
    """What was read, after the system message that stands beside it, if one does."""
    given = [name for name in _SYSTEM if row.get(name)]
    if not given:
        return read
    text = content_of(given[0], row[given[0]])
    if len(given) > 1:
        raise UnusableError(f"the row has both {given[0]} and {given[1]}: leave one of them out")
    first = read.messages[0] if read.messages else {}
    if isinstance(first, dict) and first.get("role") == "system":
        if first.get("content") == text:
            return read
        raise UnusableError(f"{given[0]} stands beside a system message: leave one of them out")
    return read._replace(
        messages=[message("system", text), *read.messages],
        prompt_length=read.prompt_length and read.prompt_length + 1,
    )


def _check_characters(demonstration: Demonstration) -> None:
    """Raise UnusableError for half a surrogate pair, which JSON allows and tokenizers fail on."""
    parts = [
        demonstration.id,
        demonstration.messages,
        demonstration.tools,
        demonstration.template_kwargs,
    ]
    try:
        json.dumps(parts, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise UnusableError(f"the text holds half a surrogate pair, \\u{half:04x}") from error


# --- the formats


class Read(NamedTuple):
    """What a format reads from a row."""

    messages: Messages
    prompt_length: int = 0
    tools: list[Row] | None = None


def _from_turns(*names: str) -> Callable[[Row], Read]:
    def convert(row: Row) -> Read:
        name = next((name for name in names if row.get(name) is not None), names[0])
        _refuse_weights_beside(row, name)
        return Read(list_of_turns(name, row.get(name)))

    return convert


def _from_alpaca(row: Row) -> Read:
    history = typed("history", from_json("history", row.get("history") or []), list, "a list")
    turns = list_of_turns("history", [text for pair in history for text in _pair(pair)])
    given = next((name for name in ("input", "context") if row.get(name)), None)
    question = _string(row, "instruction") + (f"\n\n{_string(row, given)}" if given else "")
    key = "output" if row.get("output") is not None else "response"
    return Read([*turns, message("user", question), _answer(row, key if key in row else "output")])


def _pair(pair: Any) -> list[str]:
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
        return pair
    raise UnusableError("history is not a list of pairs of a question and an answer")


def _from_prompt_completion(row: Row) -> Read:
    key = "completion" if row.get("completion") is not None else "response"
    prompt, completion = _messages_of(row, "prompt", "user"), _messages_of(row, key, "assistant")
    if isinstance(row[key], list):
        _refuse_weights_beside(row, key)
    else:
        completion = [_answer(row, key)]
    has_answers = any(each.get("role") == "assistant" for each in prompt)
    return Read([*prompt, *completion], len(prompt) if has_answers else 0)


def _messages_of(row: Row, key: str, role: str) -> Messages:
    is_list = isinstance(row.get(key), list)
    return list_of_turns(key, row[key]) if is_list else [message(role, _string(row, key))]


def _from_question(row: Row) -> Read:
    question, answer = next((pair for pair in QUESTIONS if _has(*pair)(row)), QUESTIONS[0])
    return Read([message("user", _string(row, question)), _answer(row, answer)])


def _from_query_and_calls(row: Row) -> Read:
    answers = typed("answers", from_json("answers", row.get("answers")), list, "a list")
    calls = message("assistant", "") | {"tool_calls": calls_of("answers", answers)}
    tools = [_as_function(tool) for tool in _tools(row) or []]
    return Read([message("user", _string(row, "query")), calls | _weights_in(row)], tools=tools)


def _as_function(tool: Row) -> Row:
    """A tool in OpenAI's form, from its name, description and parameters by name."""
    if "name" not in tool:
        return tool
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters.get("properties"), dict):
        parameters = {"type": "object", "properties": parameters}
    return {"type": "function", "function": tool | {"parameters": parameters}}


def _answer(row: Row, key: str) -> Row:
    """The assistant's message of a row of texts, with the reasoning and weights beside it."""
    has_reasoning = row.get("reasoning") and not isinstance(row["reasoning"], bool | int | float)
    reasoning = {"reasoning_content": _string(row, "reasoning")} if has_reasoning else {}
    return message("assistant", _string(row, key)) | reasoning | _weights_in(row)


def _weights_in(fields: Row) -> Row:
    return {key: fields[key] for key in WEIGHT_KEYS if fields.get(key) is not None}


def _refuse_weights_beside(row: Row, key: str) -> None:
    """Raise UnusableError for weights outside the messages, as their message is unknown."""
    for name in _weights_in(row):
        raise UnusableError(
            f"{name} stands beside {key}: put it into the assistant's message that it belongs to"
        )


def _string(row: Row, key: str) -> str:
    return typed(key, row.get(key), str, "a string")


class Format(NamedTuple):
    """One format of a row: how it is recognised, and how it is converted."""

    fits: Callable[[Row], bool]
    convert: Callable[[Row], Read]


def _has(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(field) is not None for field in fields)


def _has_one(*fields: str) -> Callable[[Row], bool]:
    return lambda row: any(row.get(field) is not None for field in fields)


def _has_only(*fields: str) -> Callable[[Row], bool]:
    return lambda row: _has(*fields)(row) and row.keys() - _ABOUT <= set(fields)


QUESTIONS = (("question", "answer"), ("question", "response"), ("query", "response"))
FORMATS: Mapping[str, Format] = {  # a row of several formats is read as the first of them
    "messages": Format(_has("messages"), _from_turns("messages")),
    "sharegpt": Format(
        _has_one("conversations", "conversation"), _from_turns("conversations", "conversation")
    ),
    "alpaca": Format(
        lambda row: _has("instruction")(row) and _has_one("output", "response")(row), _from_alpaca
    ),
    "prompt-completion": Format(
        lambda row: _has("prompt")(row) and _has_one("completion", "response")(row),
        _from_prompt_completion,
    ),
    "question-answer": Format(
        lambda row: any(_has_only(*pair)(row) for pair in QUESTIONS), _from_question
    ),
    "query-calls": Format(_has_only("query", "answers", "tools"), _from_query_and_calls),
}
