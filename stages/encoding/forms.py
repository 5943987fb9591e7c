"""The forms of a conversation that chat templates expect, and the choice of one that is shown.

Templates disagree on calls: most want arguments as an object and no content as "", some the text of
the arguments or None as content. Some read contents as lists of parts only. The plainest form that
a template shows completely is used.
"""

import json
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import combinations
from typing import Any

from ..demonstrations.demonstration import Messages, Row, UnusableError
from .turns import TemplatedChat


def best_chat(chat: TemplatedChat) -> TemplatedChat:
    """The chat in the first form that its template shows completely, or as far as it shows any.

    Raises UnusableError if the template fails on every form, or leaves out calls.
    """
    partial: TemplatedChat | None = None
    failure: UnusableError | None = None
    for messages in _forms(chat.messages):
        other = chat.with_messages(messages)
        try:
            hidden = _hidden_call(other)
            if hidden is None and _shows_contents(other):
                return other
        except UnusableError as error:
            failure = failure or error
            continue
        if hidden is None:
            partial = partial or other
        else:
            failure = UnusableError(f"the template does not show {hidden}")
    if partial is not None:
        return partial
    assert failure is not None, "a conversation has a form"
    raise UnusableError("; ".join([str(failure), *_text_arguments(chat.messages)][:2]))


def _text_arguments(messages: Messages) -> Iterator[str]:
    """The arguments that are no object in any form."""
    for i, message in enumerate(messages):
        for j, call in enumerate(message.get("tool_calls") or []):
            if isinstance(_decoded(_function(call).get("arguments")), str):
                name = "function.arguments" if "function" in call else "arguments"
                yield f"messages[{i}].tool_calls[{j}].{name} is text, not an object"


def _hidden_call(chat: TemplatedChat) -> str | None:
    """The first call that the rendering leaves out or writes as Python does."""
    for i, message in enumerate(chat.messages):
        shown = chat.shown(i) if message.get("tool_calls") else set()
        for j, call in enumerate(message.get("tool_calls") or []):
            arguments = _function(call).get("arguments")
            as_python = isinstance(arguments, dict) and arguments and str(arguments) in chat.text
            named = any(name.startswith(f"tool_calls[{j}]") for name in shown)
            if not named or (as_python and str(arguments) != json.dumps(arguments)):
                return f"the tool_calls of messages[{i}]"
    return None


def _shows_contents(chat: TemplatedChat) -> bool:
    """Whether at least a part of each content is shown; beside calls, templates leave it out."""
    return all(
        any(name.startswith("content") for name in chat.shown(i))
        for i, message in enumerate(chat.messages)
        if str(message["content"]).strip() and not message.get("tool_calls")
    )


def _forms(messages: Messages) -> Iterator[Messages]:
    plain = [_with_calls(message, _decoded) for message in messages]
    changes = (_without_content, _as_text, _in_parts)
    changes = [change for change in changes if change(plain) != plain]
    for count in range(len(changes) + 1):
        for chosen in combinations(changes, count):
            yield reduce(lambda form, change: change(form), chosen, plain)


def _with_calls(message: Row, change: Callable[[Any], Any]) -> Row:
    """A message with the arguments of its calls changed."""
    calls = message.get("tool_calls")
    return (
        {**message, "tool_calls": [_with_arguments(call, change) for call in calls]}
        if calls
        else message
    )


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    function = _function(call)
    if "arguments" not in function:
        return call
    function = {**function, "arguments": change(function["arguments"])}
    return {**call, "function": function} if "function" in call else function


def _function(call: Any) -> Row:
    """What a call says of its function, in OpenAI's form or without its envelope."""
    if not isinstance(call, dict):
        return {}
    return call["function"] if isinstance(call.get("function"), dict) else call


def _decoded(arguments: Any) -> Any:
    """Arguments given as JSON text, as an object."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _encoded(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _as_text(messages: Messages) -> Messages:
    return [_with_calls(message, _encoded) for message in messages]


def _without_content(messages: Messages) -> Messages:
    """None as the content of a message of calls only."""
    return [
        {**message, "content": None}
        if message.get("tool_calls") and not message["content"]
        else message
        for message in messages
    ]


def _in_parts(messages: Messages) -> Messages:
    """Contents as lists of parts."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]
