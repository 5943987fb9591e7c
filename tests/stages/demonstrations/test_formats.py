"""Every form of a row, tools and names included, and rows that cannot be used."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError
from qpipe.stages.demonstrations.demonstration import Demonstration
from qpipe.stages.demonstrations.formats import FORMATS, check_readable
from qpipe.stages.demonstrations.sources import open_sources
from qpipe.tests.support.rows import (
    ASSISTANT,
    CHAT,
    QUESTION_AND_ANSWER,
    SYSTEM,
    USER,
    read,
    read_demonstrations,
    read_row,
    write,
    write_parquet,
)

FORMAT_ROWS = {
    "messages": [
        (CHAT, QUESTION_AND_ANSWER),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    ],
    "sharegpt": [
        (
            {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "One."}]},
            QUESTION_AND_ANSWER,
        ),
        (
            {
                "system": "Be kind.",
                "conversations": [
                    {"from": "user", "value": "a?", "weight": None},
                    {"from": "Assistant", "value": "One."},
                    {"from": "tool", "value": "1"},
                ],
            },
            [SYSTEM, USER, ASSISTANT, {"role": "tool", "content": "1"}],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "a?"},
                    {"from": "gpt", "value": "One."},
                ]
            },
            [SYSTEM, USER, ASSISTANT],
        ),
    ],
    "alpaca": [
        ({"instruction": "a?", "output": "One."}, QUESTION_AND_ANSWER),
        ({"instruction": "a?", "input": "", "output": "One."}, QUESTION_AND_ANSWER),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be kind."},
            [
                SYSTEM,
                {"role": "user", "content": "Add.\n\n1 1"},
                {"role": "assistant", "content": "2"},
            ],
        ),
    ],
    "prompt-completion": [
        ({"prompt": "a?", "completion": "One."}, QUESTION_AND_ANSWER),
        ({"prompt": "a?", "response": "One."}, QUESTION_AND_ANSWER),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ({"prompt": [USER], "completion": "One."}, QUESTION_AND_ANSWER),
    ],
    "question-answer": [
        ({"question": "a?", "answer": "One.", "source": "x"}, QUESTION_AND_ANSWER),
        (  # Orca
            {"id": "flan.1", "system_prompt": "Be kind.", "question": "a?", "response": "One."},
            [SYSTEM, USER, ASSISTANT],
        ),
        ({"query": "a?", "response": "One.", "type": "x"}, QUESTION_AND_ANSWER),
    ],
    "query-calls": [  # xlam
        (
            {
                "query": "a?",
                "answers": '[{"name": "clock", "arguments": {"zone": "UTC"}}, {"name": "die"}]',
                "tools": '[{"name": "clock", "parameters": {"zone": {"type": "str"}}}]',
            },
            [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "call00001",
                            "type": "function",
                            "function": {"name": "clock", "arguments": {"zone": "UTC"}},
                        },
                        {
                            "id": "call00002",
                            "type": "function",
                            "function": {"name": "die", "arguments": {}},
                        },
                    ],
                },
            ],
        ),
    ],
}
UNKNOWN = "no known format, the fields are "
FORMAT_CASES = [(name, *case) for name, cases in FORMAT_ROWS.items() for case in cases]


def test_every_format_is_tested():
    assert list(FORMAT_ROWS) == list(FORMATS)


@pytest.mark.parametrize(("name", "row", "messages"), FORMAT_CASES)
def test_format(tmp_path, name, row, messages):
    for format in ("auto", name):
        found = read_row(tmp_path, row, format=format)
        assert found.messages == messages


@pytest.mark.parametrize(("name", "row", "messages"), FORMAT_CASES)
def test_format_from_columns_of_other_rows(tmp_path, name, row, messages):
    """Arrow gives each row the fields of all rows."""
    other = {"messages": None, "prompt": None, "category": "x"} | row
    pyarrow.parquet.write_table(pa.Table.from_pylist([other]), tmp_path / "x.parquet")
    (found,) = read(str(tmp_path / "x.parquet"))
    assert found.messages == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {},
            UNKNOWN + "none: name them, as in --columns prompt=question completion=answer, or "
            "--columns messages=chat",
        ),
        ({"text": "x", "n": 1}, UNKNOWN + "text, n: "),
        ({"prompt": "a?"}, UNKNOWN + "prompt: "),
        (
            {"question": "a?", "answer": "1", "thought": "x"},
            UNKNOWN + "question, answer, thought: ",
        ),
        (
            dict.fromkeys("abcdefghijklmnop"),
            UNKNOWN + "a, b, c, d, e, f, g, h, i, j, k, l and 4 more: ",
        ),
        ({"\ud83d": "x"}, UNKNOWN + "\\ud83d: "),
        ({"x" * 999: 1}, UNKNOWN + "x" * 268),
        ({"messages": "a?"}, "messages is not JSON: "),
        ({"messages": {}}, "messages is not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["a?", 1]}, "messages[0] is not an object"),
        ({"messages": [{"content": "a?"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": 1, "content": "a?"}]}, "messages[0].role is not a name"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content is missing"),
        (
            {"messages": [{"role": "user", "content": None}, ASSISTANT]},
            "messages[0].content is missing",
        ),
        (
            {"messages": [{"role": "user", "content": ["a?"]}, ASSISTANT]},
            "messages[0].content[0] is not an object with type and text",
        ),
        ({"messages": [USER]}, "no assistant message"),
        (
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            "messages[1].content, the assistant's answer, is empty",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
            "messages[1].content is missing",
        ),
        ({"conversations": []}, "messages is empty"),
        ({"conversations": [5]}, "conversations[0] is not an object"),
        ({"conversations": [{"value": "a?"}]}, "conversations[0].from is missing"),
        ({"conversations": [{"from": 1, "value": ""}]}, "conversations[0].from is not a name"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value is missing"),
        (
            {"conversations": [{"from": "human", "value": 5}]},
            "conversations[0].value is not a string",
        ),
        ({"instruction": 5, "output": "x"}, "instruction is not a string"),
        ({"instruction": "a?", "input": 5, "output": "x"}, "input is not a string"),
        ({"instruction": "a?", "output": "x", "system": 5}, "system is not a string"),
        ({"prompt": {}, "response": "x"}, "prompt is not a string"),
        ({"prompt": "a?", "response": ""}, "messages[1].content, the assistant's answer, is empty"),
        ({**CHAT, "tools": "{"}, "tools is not JSON: "),
        ({**CHAT, "tools": {"name": "clock"}}, "tools is not a list of objects"),
        ({**CHAT, "tools": ["clock"]}, "tools is not a list of objects"),
    ],
)
def test_row_that_cannot_be_used(tmp_path, row, reason):
    found = read_row(tmp_path, row)
    assert found.startswith(reason) if reason.endswith(": ") else found == reason


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "user", "assistant", "[]", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "spans", "weight"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = ["messages", "conversations", "instruction", "input", "output", "system"]
FIELDS += ["prompt", "completion", "response", "tools", "id", "weight", "spans", "token_weights"]


@given(rows=st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON, min_size=1))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_row_is_a_demonstration_or_a_reject(tmp_path, rows):
    sources = open_sources([write(tmp_path / "x.jsonl", rows)])
    for format in ("auto", *FORMATS):
        found = list(read_demonstrations(sources, format))
        assert [row.line for row in found] == list(range(1, len(rows) + 1))


def test_unknown_speaker(tmp_path):
    reason = read_row(tmp_path, {"conversations": [{"from": "narrator", "value": "x"}]})
    assert reason.startswith("conversations[0].from is 'narrator', known are system, human, user,")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("messages", "messages is missing"),
        ("sharegpt", "conversations is missing"),
        ("alpaca", "output is missing"),
        ("prompt-completion", "prompt is missing"),
        ("question-answer", "question is missing"),
        ("query-calls", "answers is missing"),
    ],
)
def test_format_that_is_forced(tmp_path, name, reason):
    assert read_row(tmp_path, {"instruction": "a?"}, format=name) == reason


@pytest.mark.parametrize(("value", "id"), [("a", "a"), (7, "7"), (0, "0"), (None, "x.jsonl:1")])
def test_id(tmp_path, value, id):
    assert read_row(tmp_path, CHAT | {"id": value}).id == id


@pytest.mark.parametrize("value", ["", " ", True, 1.5, [1], {"a": 1}])
def test_id_that_names_nothing(tmp_path, value):
    reason = f"id is {value!r}: give a text or a whole number, or leave it out"
    assert read_row(tmp_path, CHAT | {"id": value}) == reason


TOOLS = [{"type": "function", "function": {"name": "clock", "default": None}}]
CALL = {"role": "assistant", "tool_calls": [{"name": "clock", "arguments": {"zone": None}}]}


class TestTools:
    def test_as_a_list_or_as_text(self, tmp_path):
        for tools in (TOOLS, json.dumps(TOOLS)):
            assert read_row(tmp_path, CHAT | {"tools": tools}).tools == TOOLS

    def test_no_tools(self, tmp_path):
        for tools in (None, [], "[]", "null"):
            assert read_row(tmp_path, CHAT | {"tools": tools}).tools is None

    def test_a_call_needs_no_content(self, tmp_path):
        for call in (CALL, CALL | {"content": None}, CALL | {"content": ""}):
            found = read_row(tmp_path, {"messages": [USER, call]})
            assert found.messages[1] == CALL | {"content": ""}

    def test_fields_that_columns_fill_with_nothing_are_absent(self, tmp_path):
        calls = [
            {"name": "clock", "arguments": {"zone": "UTC"}},
            {"name": "die", "arguments": {"n": 6}},
        ]
        messages = [USER, {"role": "assistant", "tool_calls": calls}, ASSISTANT]
        write_parquet(tmp_path / "x.parquet", [{"messages": messages}])
        (found,) = read(str(tmp_path / "x.parquet"))
        assert found.messages == [
            USER,
            {"role": "assistant", "content": "", "tool_calls": calls},
            ASSISTANT,
        ]

    def test_half_a_surrogate_pair_in_a_call(self, tmp_path):
        call = {"role": "assistant", "tool_calls": [{"name": "\udc00"}]}
        reason = read_row(tmp_path, {"messages": [USER, call]})
        assert reason == "the text holds half a surrogate pair, \\udc00"

    def test_half_a_surrogate_pair_in_a_field_that_is_not_read(self, tmp_path):
        assert isinstance(read_row(tmp_path, CHAT | {"note": "\udc00"}), Demonstration)


# --- the early check ---------------------------------------------------------------------------


class TestCheckReadable:
    def test_one_usable_row_is_enough(self, tmp_path):
        check_readable(open_sources([write(tmp_path / "x.jsonl", [{}] * 150 + [CHAT])]))

    def test_no_usable_row(self, tmp_path):
        good = write(tmp_path / "good.jsonl", [CHAT])
        name = write(tmp_path / "x.jsonl", [{"text": "x"}] * 150)
        with pytest.raises(UserError) as error:
            check_readable(open_sources([good, name]))
        assert str(error.value) == (
            f"demonstrations {name}: none of its rows could be used; the first: line 1: "
            "no known format, the fields are text: name them, as in --columns prompt=question "
            "completion=answer, or --columns messages=chat; formats are messages, sharegpt, "
            "alpaca, prompt-completion, question-answer, query-calls, name one with --format"
        )

    def test_format_that_is_forced(self, tmp_path):
        sources = open_sources([write(tmp_path / "x.jsonl", [CHAT])])
        with pytest.raises(
            UserError, match=r"none of its rows .* line 1: conversations is missing"
        ):
            check_readable(sources, "sharegpt")
