"""Weights in demonstrations: which forms say them, and what is refused."""

import json

import pytest
from qpipe.stages.demonstrations.demonstration import TurnWeights, WeightedSpan
from qpipe.tests.support.rows import (
    ASSISTANT,
    CHAT,
    QUESTION_AND_ANSWER,
    SYSTEM,
    USER,
    read,
    read_row,
    reasons,
    write,
    write_parquet,
)

GIVEN = [
    ({"weight": 0}, TurnWeights(0.0)),
    ({"weight": 0.5}, TurnWeights(0.5)),
    ({"spans": [[0, 3]]}, TurnWeights(0.0, ((0, 3, 1.0),))),
    ({"spans": [[2, 4, 0], [0, 2, 3]], "weight": 2}, TurnWeights(2.0, ((0, 2, 3.0), (2, 4, 0.0)))),
    ({"spans": [{"start": 0, "end": 1}]}, TurnWeights(0.0, ((0, 1, 1.0),))),
    ({"spans": [{"start": 0, "end": 1, "weight": 2}]}, TurnWeights(0.0, ((0, 1, 2.0),))),
    ({"spans": [[0.0, 3.0, None]]}, TurnWeights(0.0, ((0, 3, 1.0),))),  # as columns hold them
    ({"spans": []}, TurnWeights(0.0, ())),
    ({"token_weights": [1, 0.5]}, TurnWeights(1.0, tokens=(1.0, 0.5))),
    ({"token_weights": [], "weight": 1e30}, TurnWeights(1e30, tokens=())),
]
WITHOUT = [{}, {"weight": 1}, {"weight": 1.0}, {"weight": None, "spans": None}]


def weighed_rows(fields):
    """Rows of every form in which the answer to a question has these fields."""
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "One.", **fields}]
    return [
        {"messages": [USER, ASSISTANT | fields]},
        {"conversations": turns},
        {"instruction": "a?", "output": "One."} | fields,
        {"prompt": "a?", "completion": "One."} | fields,
        {"prompt": [USER], "response": "One."} | fields,
        {"prompt": [USER], "completion": [ASSISTANT | fields]},
    ]


class TestWeights:
    @pytest.mark.parametrize(("fields", "given"), GIVEN)
    def test_in_every_form_and_not_in_the_messages(self, tmp_path, fields, given):
        for row in weighed_rows(fields):
            found = read_row(tmp_path, row)
            assert found.messages == QUESTION_AND_ANSWER
            assert found.weights == (None, given)

    @pytest.mark.parametrize("fields", WITHOUT)
    def test_that_say_nothing(self, tmp_path, fields):
        for row in weighed_rows(fields):
            found = read_row(tmp_path, row)
            assert found.messages == QUESTION_AND_ANSWER
            assert found.weights == ()

    def test_one_for_each_message(self, tmp_path):
        messages = [USER | {"weight": "?"}, ASSISTANT, USER, ASSISTANT | {"weight": 2}]
        found = read_row(tmp_path, {"messages": messages})
        assert found.messages == QUESTION_AND_ANSWER * 2
        assert found.weights == (None, None, None, TurnWeights(2.0))

    def test_from_columns(self, tmp_path):
        """Arrow makes floats of all numbers of a list, and gives each message every field."""
        spans = [[0, 3], [3, 4, 0.5]]
        write_parquet(tmp_path / "x.parquet", [{"messages": [USER, ASSISTANT | {"spans": spans}]}])
        (found,) = read(str(tmp_path / "x.parquet"))
        assert found.messages == QUESTION_AND_ANSWER
        assert found.weights[1].spans == (WeightedSpan(0, 3, 1.0), WeightedSpan(3, 4, 0.5))
        assert [type(part) for part in found.weights[1].spans[0]] == [int, int, float]

    def test_characters_are_those_of_python(self, tmp_path):
        content = (
            b'{"messages": [%s, {"role": "assistant", "content": "\\ud83d\\ude42x", "spans": %s}]}'
        )
        user = json.dumps(USER).encode()
        assert reasons(write(tmp_path / "x.jsonl", content % (user, b"[[1, 2]]"))) == [(1, None)]
        assert reasons(write(tmp_path / "x.jsonl", content % (user, b"[[1, 3]]"))) == [
            (1, "messages[1].spans[0] is [1, 3]: it ends after the 2 characters of the content")
        ]

    @pytest.mark.parametrize("key", ["spans", "token_weights"])
    def test_of_a_message_that_is_not_an_assistant_s(self, tmp_path, key):
        for i, messages in enumerate(([USER | {key: [[0, 1]]}], [USER, SYSTEM | {key: [1]}])):
            reason = read_row(tmp_path, {"messages": [*messages, ASSISTANT]})
            assert reason == f"messages[{i}].{key}: only an assistant's message can carry {key}"
        turns = [{"from": "human", "value": "a?", key: [1]}, {"from": "gpt", "value": "One."}]
        reason = read_row(tmp_path, {"conversations": turns})
        assert reason == f"messages[0].{key}: only an assistant's message can carry {key}"
        empty = [USER | {key: []}, ASSISTANT]
        assert read_row(tmp_path, {"messages": empty}).weights == ()

    @pytest.mark.parametrize("field", [{"weight": 2}, {"spans": []}, {"token_weights": [1]}])
    def test_beside_whole_messages(self, tmp_path, field):
        """Whose they are is not said, and what is said must not be lost."""
        (name,) = field
        for row in (CHAT, {"conversations": []}, {"prompt": "a?", "completion": [ASSISTANT]}):
            beside = list(row)[-1]
            assert read_row(tmp_path, row | field) == (
                f"{name} stands beside {beside}: put it into the assistant's message that it "
                "belongs to"
            )
            assert "beside" not in str(read_row(tmp_path, row | {name: None}))

    @pytest.mark.parametrize(
        "value", [True, -1, -0.001, float("nan"), float("inf"), "1", [1], {}, 10**400, 3.5e38]
    )
    def test_no_weight(self, tmp_path, value):
        for fields, name in (
            ({"weight": value}, "weight"),
            ({"token_weights": [1, value]}, "token_weights[1]"),
            ({"spans": [[0, 1], [1, 2, value]]}, "spans[1].weight"),
            ({"spans": [{"start": 0, "end": 1, "weight": value}]}, "spans[0].weight"),
        ):
            reason = read_row(tmp_path, {"messages": [USER, ASSISTANT | fields]})
            assert reason.startswith(f"messages[1].{name} is ")
            assert reason.endswith(": give a number from 0 to 1e+30")
            assert len(reason) < 150

    @pytest.mark.parametrize(
        ("spans", "reason"),
        [
            ({"start": 0}, " is {'start': 0}: give a list of [start, end, weight]"),
            (3, " is 3: give a list of [start, end, weight]"),
            ([3], "[0] is 3: give [start, end], [start, end, weight], or these by name"),
            ([[3]], "[0] is [3]: give [start, end], [start, end, weight], or these by name"),
            (
                [[0, 1, 1, 1]],
                "[0] is [0, 1, 1, 1]: give [start, end], [start, end, weight], or these by name",
            ),
            (
                [{"start": 0, "end": 1, "weigth": 2}],
                "[0] is {'end': 1, 'start': 0, 'weigth': 2}: give [start, end], [start, end, "
                "weight], or these by name",
            ),
            ([{"start": 0}], "[0] is {'start': 0}: start and end must be whole numbers"),
            ([[0, 1.5]], "[0] is [0, 1.5]: start and end must be whole numbers"),
            ([[False, 1]], "[0] is [False, 1]: start and end must be whole numbers"),
            ([["0", 1]], "[0] is ['0', 1]: start and end must be whole numbers"),
            ([[0, 1], [-1, 1]], "[1] is [-1, 1]: it starts before the content does"),
            ([[3, 5]], "[0] is [3, 5]: it ends after the 4 characters of the content"),
            ([[2, 2]], "[0] is [2, 2]: it holds no character, its end must be above its start"),
            ([[3, 2]], "[0] is [3, 2]: it holds no character, its end must be above its start"),
            (
                [[2, 4], [0, 3]],
                ": [0, 3] and [2, 4] overlap: give each character one weight",
            ),
            ([[1, 2], [1, 2]], ": [1, 2] and [1, 2] overlap: give each character one weight"),
        ],
    )
    def test_no_spans(self, tmp_path, spans, reason):
        found = read_row(tmp_path, {"messages": [USER, ASSISTANT | {"spans": spans}]})
        assert found == f"messages[1].spans{reason}"

    def test_no_list_of_weights(self, tmp_path):
        for value in (1, {"0": 1}, "1"):
            fields = {"token_weights": value}
            reason = read_row(tmp_path, {"messages": [USER, ASSISTANT | fields]})
            assert reason == (
                f"messages[1].token_weights is {value!r}: give a list of numbers, one for a token"
            )

    def test_by_token_and_by_character(self, tmp_path):
        fields = {"token_weights": [1], "spans": [[0, 1]]}
        assert read_row(tmp_path, {"messages": [USER, ASSISTANT | fields]}) == (
            "messages[1] has both spans and token_weights: leave one of them out"
        )
