"""Any conversation under any template: tokens with weights, or a reject."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.storage.json_files import json_bytes
from qpipe.stages.demonstrations.formats import parse_row
from qpipe.stages.demonstrations.readers.text import json_reader
from qpipe.stages.demonstrations.sources import Source
from qpipe.stages.encoding.encoder import Encoded, Encoder
from qpipe.stages.encoding.template import load_template

from .inputs import Draw, damaged, fuzz, made_or_refused
from .tiny import CHATML, VOCAB_SIZE, tokenizer

SOURCE = Source("chats", "chats", json_reader(Path("chats.jsonl")))
TEMPLATES = (
    CHATML,
    CHATML.replace("message['content']", "message['content'] | trim"),
    CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
    CHATML.replace("message['content']", "message['content'] | upper"),
    CHATML.replace("message['content']", "message['content'] * 2"),
    CHATML.replace("in messages", "in messages[-2:]"),
    CHATML.replace("{% endfor %}", "{{ 1 / loop.revindex0 }}{% endfor %}"),
    "{{ messages[0]['content'] }}",
    "{% for m in messages %}{{ m.tool_calls[0].name }}{{ m.content }}{% endfor %}",
    "",
)
FRAGMENTS = (
    *("a", "ab", " ", "\n", "é", "\U0001f600", "</think>", "<think>", "<|im_end|>", "\ue000"),
    *("x" * 40, "<|im_start|>assistant\n", "e\u0301", "\u200b", "{{ 1 }}", "\r\n", "\0"),
)
fragments = st.sampled_from(FRAGMENTS) | st.text(max_size=3)
texts = st.lists(fragments, max_size=5).map("".join)


@st.composite
def conversations(draw: Draw) -> dict[str, Any]:
    """A row of messages, some of them with weights of every kind."""
    messages = []
    for _ in range(draw(st.integers(1, 5))):
        role = draw(st.sampled_from(["user", "assistant", "assistant", "system", "tool"]))
        message: dict[str, Any] = {"role": role, "content": draw(texts)}
        size = len(message["content"])
        if role == "assistant":
            match draw(st.integers(0, 4)):
                case 1:
                    message["weight"] = draw(st.floats(0, 3))
                case 2:
                    edges = sorted(draw(st.sets(st.integers(0, size), max_size=6)))
                    pairs = zip(edges[::2], edges[1::2], strict=False)
                    message["spans"] = [[*pair, draw(st.floats(0, 3))] for pair in pairs]
                case 3:
                    count = len(message["content"].encode(errors="replace"))
                    message["token_weights"] = [0.5] * draw(st.sampled_from([count, count + 1, 2]))
                case 4:
                    message["tool_calls"] = [{"name": draw(texts)}]
        messages.append(message)
    return {"messages": messages}


@cache
def encoder(template: str | None, supervise: str, max_length: int, too_long: str) -> Encoder:
    return Encoder(tokenizer(), template, max_length, supervise, too_long, VOCAB_SIZE)


def encoded(row: dict[str, Any], made: Encoder) -> Encoded | Reject:
    """A row encoded, and what holds of any."""
    demonstration = parse_row(SOURCE, 1, row, "auto")
    if isinstance(demonstration, Reject):
        return demonstration
    found = made.encode(demonstration)
    if isinstance(found, Reject):
        json_bytes(found)
        return found
    example, weights = found.example, found.example.token_weights
    assert 2 <= len(example.input_ids) <= made.max_length
    assert (example.input_ids >= 0).all()
    assert (example.input_ids < VOCAB_SIZE).all()
    assert len(example.positions) == len(weights) > 0
    assert example.positions[0] >= 1
    assert (np.diff(example.positions) > 0).all()
    assert example.positions[-1] < len(example.input_ids)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    return found


@fuzz(
    60,
    row=conversations(),
    template=st.none() | st.sampled_from(TEMPLATES),
    supervise=st.sampled_from(["assistant", "last", "all"]),
    max_length=st.sampled_from([2, 20, 4096]),
    too_long=st.sampled_from(["reject", "cut"]),
)
def test_conversations_of_anything(
    row: dict[str, Any], template: str | None, supervise: str, max_length: int, too_long: str
) -> None:
    encoded(row, encoder(template, supervise, max_length, too_long))


@fuzz(40, row=conversations())
def test_without_a_template_every_token_is_where_its_character_is(row: dict[str, Any]) -> None:
    """Bytes are tokens: what is supervised, and with which weight, is told without any search."""
    found = encoded(row, encoder(None, "assistant", 4096, "reject"))
    if isinstance(found, Reject):
        return
    supervised, weights, at = [], [], 0
    messages = parse_row(SOURCE, 1, row, "auto").messages  # pyright: ignore
    for message, stated in zip(messages, row["messages"], strict=True):
        own = tokens_of(message["content"])
        if message["role"] == "assistant":
            own += [] if message["content"].endswith("<|im_end|>") else tokens_of("<|im_end|>")
            weight = stated.get("weight")
            # a weight below the least float32 is stored as 0, which supervises nothing
            counts = message["content"].strip() and (weight is None or np.float32(weight) > 0)
            supervised += range(at, at + len(own)) if counts else ()
        at += len(own)
    supervised = [place for place in supervised if place > 0]
    assert found.example.positions.tolist() == supervised
    assert len(found.example.input_ids) == at
    given = [m.get("weight") for m in row["messages"] if m["role"] == "assistant"]
    if not any({"spans", "token_weights"} & m.keys() for m in row["messages"]):
        weights = {1.0 if each is None else float(np.float32(each)) for each in given}
        assert set(found.example.token_weights.tolist()) <= weights


def tokens_of(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@fuzz(30, template=st.sampled_from(TEMPLATES).map(str.encode).flatmap(damaged), row=conversations())
def test_templates_damaged(template: bytes, row: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".jinja") as file:
        file.write(template)
        file.flush()
        text = made_or_refused(lambda: load_template(file.name, tokenizer()))
    if text is not None:
        encoded(row, Encoder(tokenizer(), text, 4096))
