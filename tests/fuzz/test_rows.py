"""Any row is a demonstration or a reject that can be written down, and its form changes nothing."""

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.storage.json_files import json_bytes
from qpipe.stages.demonstrations.demonstration import Demonstration
from qpipe.stages.demonstrations.formats import FORMATS, parse_row
from qpipe.stages.demonstrations.message_weights import WEIGHT_KEYS
from qpipe.stages.demonstrations.readers.text import json_reader
from qpipe.stages.demonstrations.sources import Source

from .inputs import Draw, fuzz, odd_values, spoilt

SOURCE = Source("chats", "chats", json_reader(Path("chats.jsonl")))
FIELDS = (
    *("messages", "conversations", "instruction", "input", "output", "system", "prompt"),
    *("completion", "response", "tools", "id", *WEIGHT_KEYS),
    *("role", "content", "from", "value", "tool_calls", "start", "end"),
)
of_columns = st.sampled_from([b"\xff", datetime(2026, 1, 1), Decimal("1e400"), (1, 2), {1: "a"}])
odd_parts = (
    odd_values
    | of_columns
    | st.dictionaries(st.sampled_from(FIELDS), odd_values, max_size=4)
    | st.lists(st.dictionaries(st.sampled_from(FIELDS), odd_values, max_size=4), max_size=3)
)
contents = st.text(min_size=1, max_size=8).filter(lambda text: text.strip())


@st.composite
def weights(draw: Draw, content: str) -> dict[str, Any]:
    """What a message may say of its weights."""
    weight = st.floats(0, 1e30) | st.integers(0, 9)
    said: dict[str, Any] = {}
    if draw(st.booleans()):
        said["weight"] = draw(weight)
    match draw(st.integers(0, 2)):
        case 1:
            edges = draw(st.lists(st.integers(0, len(content)), unique=True, max_size=6))
            pairs = zip(*[iter(sorted(edges))] * 2, strict=False)
            said["spans"] = [[start, end, draw(weight)] for start, end in pairs]
        case 2:
            said["token_weights"] = draw(st.lists(weight, max_size=4))
    return said


@st.composite
def exchanges(draw: Draw) -> tuple[str, str, dict[str, Any]]:
    """A question, an answer, and the answer's weights."""
    answer = draw(contents)
    return draw(contents), answer, draw(weights(answer))


def in_every_form(question: str, answer: str, said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """An exchange as a row of each form."""
    user = {"role": "user", "content": question}
    assistant = {"role": "assistant", "content": answer} | said
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer} | said]
    return {
        "messages": {"messages": [user, assistant]},
        "sharegpt": {"conversations": turns},
        "alpaca": {"instruction": question, "output": answer} | said,
        "prompt-completion": {"prompt": question, "completion": answer} | said,
    }


def parsed(row: Any, format: str) -> Demonstration | Reject:
    """A row read, and what holds of any row."""
    found = parse_row(SOURCE, 7, row, format)
    assert (found.source, found.line) == ("chats", 7)
    if isinstance(found, Reject):
        assert found.reason
        json_bytes(found)  # as a sidecar holds it
        return found
    roles = [message["role"] for message in found.messages]
    assert "assistant" in roles
    for message in found.messages:
        assert isinstance(message["content"], str)
        assert not message.keys() & set(WEIGHT_KEYS)
        assert None not in message.values()
    assert len(found.weights) in (0, len(roles))
    for role, weight in zip(roles, found.weights, strict=False):
        assert weight is None or role == "assistant"
    f"{found.id}{found.messages}".encode()
    return found


@st.composite
def spoilt_rows(draw: Draw) -> Any:
    forms = in_every_form(*draw(exchanges()))
    row = draw(st.sampled_from(list(forms.values()))) | {"id": draw(contents)}
    return draw(spoilt(row, odd_parts))


@fuzz(150, row=spoilt_rows(), format=st.sampled_from(["auto", *FORMATS]))
def test_rows_of_columns_spoilt(row: Any, format: str) -> None:
    parsed(row, format)


@fuzz(150, row=spoilt_rows(), format=st.sampled_from(["auto", *FORMATS]))
def test_rows_of_json_spoilt(row: Any, format: str) -> None:
    parsed(as_json(row), format)


@fuzz(50, line=st.binary() | st.text().map(str.encode))
def test_lines_of_anything(line: bytes) -> None:
    parsed(line, "auto")


def as_json(row: Any) -> bytes:
    """As a line of JSON; what it does not know as text, and what nests too deep as it began."""
    try:
        return json.dumps(row, default=str).encode()
    except RecursionError:
        return b"[" * 5000


@fuzz(60, exchange=exchanges())
def test_a_form_changes_nothing(exchange: tuple[str, str, dict[str, Any]]) -> None:
    question, answer, said = exchange
    forms = in_every_form(question, answer, said)
    found = [parsed(row, format) for format, row in forms.items()]
    found += [parsed(json.dumps(row).encode(), "auto") for row in forms.values()]
    assert all(each == found[0] for each in found)
    (first,) = found[:1]
    assert isinstance(first, Demonstration)
    assert [message["content"] for message in first.messages] == [question, answer]
    if said.get("spans"):
        assert first.weights[1] is not None
        assert [list(span) for span in first.weights[1].spans or ()] == said["spans"]
