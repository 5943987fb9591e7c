"""`--columns`: rows of any form, by the names of their fields."""

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.stages.demonstrations.columns import parse_columns
from qpipe.stages.demonstrations.demonstration import Demonstration
from qpipe.stages.demonstrations.formats import check_readable, parse_row
from qpipe.stages.demonstrations.sources import open_sources
from qpipe.tests.support.rows import QUESTION_AND_ANSWER, SYSTEM, write

THOUGHT = [QUESTION_AND_ANSWER[0], QUESTION_AND_ANSWER[1] | {"reasoning_content": "hm"}]


def read(tmp_path, row, *columns):
    (source,) = open_sources([write(tmp_path / "x.jsonl", [row])])
    found = parse_row(source, 1, row, "auto", parse_columns(columns))
    return found if isinstance(found, Demonstration) else found.reason


@pytest.mark.parametrize(
    ("row", "columns", "messages"),
    [
        ({"q": "a?", "a": "One."}, ["prompt=q", "completion=a"], QUESTION_AND_ANSWER),
        ({"data": {"chat": QUESTION_AND_ANSWER}}, ["messages=data.chat"], QUESTION_AND_ANSWER),
        ({"data.chat": QUESTION_AND_ANSWER}, ["messages=data.chat"], QUESTION_AND_ANSWER),
        ({"chosen": QUESTION_AND_ANSWER, "rejected": []}, ["messages=chosen"], QUESTION_AND_ANSWER),
        (
            {"q": "a?", "a": ["Zero.", "One."], "s": "Be kind."},
            ["prompt=q", "completion=a.1", "system=s"],
            [SYSTEM, *QUESTION_AND_ANSWER],
        ),
        (  # s1K
            {"question": "a?", "attempt": "One.", "thinking_trajectories": ["hm"], "solution": "1"},
            ["prompt=question", "completion=attempt", "reasoning=thinking_trajectories.0"],
            THOUGHT,
        ),
        (  # m23k
            {"prompt": "a?", "reasoning": "hm", "distilled_answer_string": "One.", "text": "x"},
            ["prompt=prompt", "completion=distilled_answer_string", "reasoning=reasoning"],
            THOUGHT,
        ),
    ],
)
def test_named_fields(tmp_path, row, columns, messages):
    assert read(tmp_path, row, *columns).messages == messages


def test_other_fields_are_not_read(tmp_path):
    row = {"q": "a?", "a": "One.", "messages": [], "system": "x", "id": 7, "key": "k"}
    found = read(tmp_path, row, "prompt=q", "completion=a")
    assert (found.messages, found.id) == (QUESTION_AND_ANSWER, "7")
    assert read(tmp_path, row, "prompt=q", "completion=a", "id=key").id == "k"


def test_a_field_that_a_row_does_not_have(tmp_path):
    for row in ({"q": "a?"}, {"q": "a?", "data": []}, {"q": "a?", "data": {"a": None}}):
        reason = read(tmp_path, row, "prompt=q", "completion=data.a")
        fields = ", ".join(row)
        assert reason == (f"no field data.a (--columns completion=data.a), the fields are {fields}")
    assert read(tmp_path, {"q": "a?", "a": 5}, "prompt=q", "completion=a") == (
        "completion is not a string"
    )


def test_a_field_that_no_row_has(tmp_path):
    name = write(tmp_path / "x.jsonl", [b"{", {"q": "a?", "a": "One."}][1:] * 3)
    columns = parse_columns(["prompt=q", "completion=a", "system=sytem"])
    with pytest.raises(UserError) as error:
        check_readable(open_sources([name]), "auto", columns)
    assert str(error.value) == (
        f"demonstrations {name}: none of its first rows has the field sytem of --columns "
        "system=sytem: name a field that they have"
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["prompt"], "--columns prompt: give NAME=FIELD, where NAME is one of prompt, completion"),
        (["answer=a"], "--columns answer=a: give NAME=FIELD"),
        (["prompt="], "--columns prompt=: give NAME=FIELD"),
        (["prompt=a", "prompt=b"], "--columns prompt=b: prompt is given twice"),
        (["prompt=a"], "--columns prompt=a: give messages, or prompt and completion"),
        (["system=a"], "--columns system=a: give messages, or prompt and completion"),
        (["prompt=a", "completion=b", "messages=c"], "give messages, or prompt and completion"),
    ],
)
def test_columns_that_are_refused(columns, words):
    with pytest.raises(UserError) as error:
        parse_columns(columns)
    assert words in str(error.value)
