"""The ways in which rows write turns, calls and contents, what stands beside them, and flags."""

import json

import pytest
from qpipe.tests.support.rows import (
    ASSISTANT,
    CHAT,
    QUESTION_AND_ANSWER,
    SYSTEM,
    USER,
    read_row,
)

LONGER = [*QUESTION_AND_ANSWER, {"role": "user", "content": "b?"}]
LONGER += [{"role": "assistant", "content": "Two."}]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "clock", "arguments": {"zone": "UTC"}},
}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SAID = {"from": "human", "value": "a?"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": json.dumps(QUESTION_AND_ANSWER)}, QUESTION_AND_ANSWER),
        ({"messages": [SAID, {"from": "gpt", "value": "One."}]}, QUESTION_AND_ANSWER),
        ({"messages": [{"role": "human", "content": "a?"}, ASSISTANT]}, QUESTION_AND_ANSWER),
        ({"conversation": QUESTION_AND_ANSWER}, QUESTION_AND_ANSWER),
        ({"conversation": [{"human": "a?", "assistant": "One."}]}, QUESTION_AND_ANSWER),
        ({"conversation": [{"input": "a?", "output": "One."}], "source": "x"}, None),  # Capybara
        ({"conversations": ["a?", "One.", "b?", "Two."], "source": "x"}, LONGER),
        ({"prompt": ["a?"], "completion": [ASSISTANT]}, QUESTION_AND_ANSWER),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "One."}]},
                ]
            },
            QUESTION_AND_ANSWER,
        ),
        ({"instruction": "b?", "output": "Two.", "history": [["a?", "One."]]}, LONGER),
        ({"instruction": "b?", "output": "Two.", "history": '[["a?", "One."]]'}, LONGER),
        ({"instruction": "a?", "context": "", "response": "One.", "category": "x"}, None),  # Dolly
        ({"system": "Be kind.", **CHAT}, [SYSTEM, *QUESTION_AND_ANSWER]),
        ({"system_prompt": "Be kind.", **CHAT}, [SYSTEM, *QUESTION_AND_ANSWER]),
        ({"system": "Be kind.", "messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ({"system": "", **CHAT}, QUESTION_AND_ANSWER),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": []}]}, QUESTION_AND_ANSWER),
        (
            {"conversations": [SAID, {"from": "function_call", "value": json.dumps(
                {"name": "clock", "arguments": {"zone": "UTC"}})}]},
            [USER, CALLS],
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "function_call": {
                "name": "clock", "arguments": {"zone": "UTC"}}}]},
            [USER, CALLS],
        ),
        (
            {"messages": [USER, {**ASSISTANT, "content": ""}, USER, ASSISTANT]},
            [USER, {**ASSISTANT, "content": ""}, USER, ASSISTANT],
        ),
    ],
)  # fmt: skip
def test_shapes(tmp_path, row, messages):
    assert read_row(tmp_path, row).messages == (messages or QUESTION_AND_ANSWER)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
            "messages[0].content[0] is of type 'image_url': only parts of text can be read",
        ),
        (
            {"conversations": [SAID, {"from": "function_call", "value": "clock()"}]},
            "conversations[1].value is not JSON: ",
        ),
        (
            {"conversations": [SAID, {"from": "function_call", "value": "[1]"}]},
            "conversations[1].value is not a call, an object with a name and arguments",
        ),
        (
            {"system": "x", "system_prompt": "y", **CHAT},
            "the row has both system and system_prompt: leave one of them out",
        ),
        (
            {"system": "x", "messages": [SYSTEM, USER, ASSISTANT]},
            "system stands beside a system message: leave one of them out",
        ),
        (
            {"instruction": "a?", "output": "One.", "history": ["x"]},
            "history is not a list of pairs of a question and an answer",
        ),
        (
            {"messages": [USER, ASSISTANT | {"tool_calls": 5}]},
            "messages[1].tool_calls is not a list",
        ),
        (
            {"messages": [USER, ASSISTANT | {"tool_calls": ["clock"]}]},
            "messages[1].tool_calls[0] is not an object",
        ),
        ({**CHAT, "chat_template_kwargs": []}, None),
        ({**CHAT, "chat_template_kwargs": 5}, "chat_template_kwargs is not an object"),
        (
            {**CHAT, "chat_template_kwargs": {"add_generation_prompt": True}},
            "chat_template_kwargs.add_generation_prompt is not an argument of a row's own: "
            "leave it out",
        ),
    ],
)
def test_what_is_refused(tmp_path, row, reason):
    found = read_row(tmp_path, row)
    assert found.startswith(reason) if reason else found.messages == QUESTION_AND_ANSWER


def test_arguments_of_the_template(tmp_path):
    for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        found = read_row(tmp_path, {**CHAT, "chat_template_kwargs": kwargs})
        assert found.template_kwargs == {"enable_thinking": False}
    assert read_row(tmp_path, CHAT).template_kwargs == {}


def test_tools_of_calls_are_in_the_form_of_open_ai(tmp_path):
    row = {"query": "a?", "answers": '[{"name": "clock"}]', "tools": '[{"name": "clock"}]'}
    assert read_row(tmp_path, row).tools == [
        {
            "type": "function",
            "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
        }
    ]


def test_results_have_the_ids_of_their_calls(tmp_path):
    value = json.dumps([{"name": "clock"}, {"name": "die"}])
    turns = [SAID, {"from": "function_call", "value": value}]
    turns += [{"from": "observation", "value": "noon"}, {"from": "observation", "value": "6"}]
    turns += [{"from": "observation", "value": "?"}]
    found = read_row(tmp_path, {"conversations": turns}).messages
    assert found[2:] == [
        {"role": "tool", "content": "noon", "tool_call_id": "call00001"},
        {"role": "tool", "content": "6", "tool_call_id": "call00002"},
        {"role": "tool", "content": "?"},
    ]


def test_reasoning_beside_an_answer(tmp_path):
    row = {"prompt": "a?", "completion": "One."}
    (_, answer) = read_row(tmp_path, row | {"reasoning": "hm"}).messages
    assert answer == ASSISTANT | {"reasoning_content": "hm"}
    assert read_row(tmp_path, row | {"reasoning": True}).messages == QUESTION_AND_ANSWER
    assert read_row(tmp_path, row | {"reasoning": ["hm"]}) == "reasoning is not a string"


class TestPrompt:
    """TRL's conversational prompt-completion: the answers in the prompt are not supervised."""

    def test_its_answers_are_context(self, tmp_path):
        row = {"prompt": LONGER[:3], "completion": LONGER[3:]}
        assert read_row(tmp_path, row).prompt_length == 3
        assert read_row(tmp_path, {"system": "Be kind.", **row}).prompt_length == 4

    def test_without_answers_it_is_a_conversation(self, tmp_path):
        row = {"prompt": [USER], "completion": [ASSISTANT]}
        assert read_row(tmp_path, row) == read_row(tmp_path, CHAT)


class TestFlags:
    def weights(self, tmp_path, first, second=None):
        turns = [USER, ASSISTANT | first, USER, ASSISTANT | (second or {})]
        found = read_row(tmp_path, {"messages": turns})
        return found if isinstance(found, str) else [each and each.weight for each in found.weights]

    @pytest.mark.parametrize("flag", ["train", "training", "trainable", "loss"])
    def test_what_is_not_trained_has_no_weight(self, tmp_path, flag):
        assert self.weights(tmp_path, {flag: False}, {flag: True}) == [None, 0, None, None]
        assert self.weights(tmp_path, {flag: False, "weight": 2}) == [None, 0, None, None]
        assert self.weights(tmp_path, {flag: True, "weight": 2}) == [None, 2, None, None]

    def test_in_turns(self, tmp_path):
        turns = [SAID, {"from": "gpt", "value": "One.", "train": False}, SAID]
        turns += [{"from": "gpt", "value": "Two."}]
        assert read_row(tmp_path, {"conversations": turns}).weights[1].weight == 0

    def test_of_others(self, tmp_path):
        row = {"messages": [USER | {"train": False}, ASSISTANT]}
        assert read_row(tmp_path, row).messages == QUESTION_AND_ANSWER
        row = {"messages": [USER | {"train": True}, ASSISTANT]}
        assert read_row(tmp_path, row) == (
            "messages[0].train: only an assistant's message can be trained on"
        )

    def test_that_are_refused(self, tmp_path):
        assert self.weights(tmp_path, {"train": "no"}) == "messages[1].train is not true or false"
        assert self.weights(tmp_path, {"train_detail": []}) == (
            "messages[1].train_detail is not known: give spans instead, or leave it out"
        )
