"""What is supervised under templates that imitate well-known families, and what may change it."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from qpipe.pipeline.format.records import Reject
from qpipe.stages.demonstrations.formats import parse_row
from qpipe.stages.encoding.encoder import Encoder

from .chats import stretches
from .families import (
    ALWAYS,
    CHANNELS,
    IDS,
    INSTRUCT,
    MARKED,
    NO_ENDS,
    ONE_CALL,
    OPEN_LAST,
    PARTS,
    PLAIN,
    TEXT_CALLS,
    THINKS,
    TOKENIZER,
    TWO_ENDS,
    WITHIN,
)

Row = dict[str, Any]


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def answer(content: Any, **fields: Any) -> Row:
    return {"role": "assistant", "content": content, **fields}


def called(*calls: dict[str, Any] | str, content: Any = "", **fields: Any) -> Row:
    functions = [{"name": "ferry", "arguments": arguments} for arguments in calls]
    calls_ = [
        {"id": f"call{i:05}", "type": "function", "function": function}
        for i, function in enumerate(functions, 1)
    ]
    return answer(content, tool_calls=calls_, **fields)


def result(content: str, number: int = 1) -> Row:
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05}", "name": "ferry"}


TALK = [user("a?"), answer("One."), user("b?"), answer("Two.")]
OPENED = [answer("Hello."), *TALK[:2]]
ONE = [user("When?"), called({"pier": "B"}), result("at nine"), answer("At nine.")]
TWO = [*ONE[:3], called({"pier": "C"}), result("at ten"), answer("At nine and ten.")]
BOTH = [
    user("When?"),
    called({"pier": "B"}, {"pier": "C", "n": 2}),
    result("at nine"),
    result("at ten", 2),
    answer("At nine and ten."),
]
LATER = [*ONE, user("Thanks."), answer("Not at all.")]
CALL_LAST = ONE[:2]
NO_ARGUMENTS = [user("When?"), called({}), *ONE[2:]]
AS_TEXT = [user("When?"), called('{"pier": "B"}', content=None), *ONE[2:]]
THOUGHT = [
    user("a?"),
    answer("<think>\nhm\n</think>\n\nOne."),
    user("b?"),
    answer("<think>\noh\n</think>\n\nTwo."),
]
TOOLS = [{"type": "function", "function": {"name": "ferry", "parameters": {}}}]

SHOWN: dict[str, tuple[str, list[tuple[list[Row], list[str]]]]] = {
    "two ends": (
        TWO_ENDS,
        [
            (TALK, ["One.<|stop|><|end|>", "Two.<|stop|><|end|>"]),
            (OPENED, ["Hello.<|stop|><|end|>", "One.<|stop|><|end|>"]),
        ],
    ),
    "the last turn is open": (OPEN_LAST, [(TALK, ["One.<|end|>", "Two."])]),
    "channels": (
        CHANNELS,
        [
            (
                TALK,
                [
                    "<|channel|>final<|message|>One.<|end|>",
                    "<|channel|>final<|message|>Two.<|return|>",
                ],
            ),
            (
                OPENED,
                [
                    "<|channel|>final<|message|>Hello.<|end|>",
                    "<|channel|>final<|message|>One.<|return|>",
                ],
            ),
            (
                TWO,
                [
                    ' to=ferry<|channel|>tool<|message|>{"pier": "B"}<|call|>',
                    ' to=ferry<|channel|>tool<|message|>{"pier": "C"}<|call|>',
                    "<|channel|>final<|message|>At nine and ten.<|return|>",
                ],
            ),
            (
                NO_ARGUMENTS,
                [
                    " to=ferry<|channel|>tool<|message|>{}<|call|>",
                    "<|channel|>final<|message|>At nine.<|return|>",
                ],
            ),
            (
                [user("When?"), called({"pier": "B"}, thinking="I ask."), *ONE[2:]],
                [
                    ' to=ferry<|channel|>tool<|message|>{"pier": "B"}<|call|>',
                    "<|channel|>final<|message|>At nine.<|return|>",
                ],
            ),
            (
                [user("When?"), called({"pier": "B"}, content="I ask.")],
                [
                    "<|channel|>think<|message|>I ask.<|end|><|begin|>assistant to=ferry"
                    '<|channel|>tool<|message|>{"pier": "B"}<|call|>'
                ],
            ),
        ],
    ),
    "results within the turn": (
        WITHIN,
        [
            (TALK, ["One.<|end|>", "Two.<|end|>"]),
            (ONE, ["<|call|>ferry pier=B<|/call|>", "At nine.<|end|>"]),
            (
                TWO,
                [
                    "<|call|>ferry pier=B<|/call|>",
                    "<|call|>ferry pier=C<|/call|>",
                    "At nine and ten.<|end|>",
                ],
            ),
            (
                BOTH,
                [
                    "<|call|>ferry pier=B<|/call|><|call|>ferry n=2 pier=C<|/call|>",
                    "At nine and ten.<|end|>",
                ],
            ),
            (CALL_LAST, ["<|call|>ferry pier=B<|/call|>"]),
            (
                [user("When?"), called({"pier": "B"}, reasoning="hm"), *ONE[2:]],
                ["hm<|/think|><|call|>ferry pier=B<|/call|>", "At nine.<|end|>"],
            ),
            (
                [
                    user("When?"),
                    called({"pier": "B"}, content="Hm.<think>"),
                    result("x"),
                    user("?"),
                ],
                ["<|call|>ferry pier=B<|/call|>", "Hm.<think>"],
            ),
        ],
    ),
    "calls as text": (
        TEXT_CALLS,
        [
            (TALK, ["One.</s>", "Two.</s>"]),
            (OPENED, ["Hello.</s>", "One.</s>"]),
            (ONE, ['<|call|>ferry {"pier": "B"}<|/call|></s>', "At nine.</s>"]),
            (
                TWO,
                [
                    '<|call|>ferry {"pier": "B"}<|/call|></s>',
                    '<|call|>ferry {"pier": "C"}<|/call|></s>',
                    "At nine and ten.</s>",
                ],
            ),
            (AS_TEXT, ['<|call|>ferry {"pier": "B"}<|/call|></s>', "At nine.</s>"]),
            (THOUGHT, ["\n\nOne.</s>", "\n\nTwo.</s>"]),
        ],
    ),
    "tools before the last question": (
        INSTRUCT,
        [
            (TALK, ["One.</s>", "Two.</s>"]),
            (
                LATER,
                [
                    '[CALL]{"name": "ferry", "arguments": {"pier": "B"}}</s>',
                    "At nine.</s>",
                    "Not at all.</s>",
                ],
            ),
        ],
    ),
    "thinks": (
        THINKS,
        [
            (TALK, ["One.<|im_end|>", "\n</think>\n\nTwo.<|im_end|>"]),
            (OPENED, ["Hello.<|im_end|>", "\n</think>\n\nOne.<|im_end|>"]),
            (THOUGHT, ["One.<|im_end|>", "oh\n</think>\n\nTwo.<|im_end|>"]),
            (AS_TEXT[:2], ["\n</think>\n\n<call>ferry<pier>B</call><|im_end|>"]),
        ],
    ),
    "one call": (
        ONE_CALL,
        [
            (
                LATER,
                [
                    '{"name": "ferry", "parameters": {"pier": "B"}}<|eot_id|>',
                    "At nine.<|eot_id|>",
                    "Not at all.<|eot_id|>",
                ],
            ),
            ([user("a?"), answer("One.", tool_calls=[])], ["One.<|eot_id|>"]),
        ],
    ),
    "no ends": (
        NO_ENDS,
        [
            (TALK, ["One.", "Two."]),
            (LATER, ['<call>ferry{"pier": "B"}</call>', "At nine.", "Not at all."]),
            (CALL_LAST, ['<call>ferry{"pier": "B"}</call>']),
        ],
    ),
    "always a prompt": (
        ALWAYS,
        [
            (TALK, ["<|message|>One.<|stop|><|end|>", "<|message|>Two.<|stop|><|end|>"]),
            (OPENED, ["<|message|>Hello.<|stop|><|end|>", "<|message|>One.<|stop|><|end|>"]),
            (CALL_LAST, ['<|think|><|/think|><|call|>ferry{"pier": "B"}<|/call|><|end|>']),
            (
                ONE,
                [
                    '<|think|><|/think|><|call|>ferry{"pier": "B"}<|/call|><|end|>',
                    "<|message|>At nine.<|stop|><|end|>",
                ],
            ),
        ],
    ),
    "calls with ids": (
        IDS,
        [
            (TALK, ["One.\n<|end|>", "Two."]),
            (CALL_LAST, ['{"name": "ferry", "arguments": {"pier": "B"}}']),
            (
                ONE,
                [
                    '{"name": "ferry", "arguments": {"pier": "B"}, "id": "call00001"}\n<|end|>',
                    "At nine.",
                ],
            ),
        ],
    ),
    "parts": (PARTS, [(TALK, ["One.<|end|>", "Two.<|end|>"])]),
    "marks of its own": (MARKED, [(TALK, ["model: One.", "model: Two."])]),
}
CASES = [
    pytest.param(template, messages, wanted, id=f"{name} {i}")
    for name, (template, cases) in SHOWN.items()
    for i, (messages, wanted) in enumerate(cases)
]


def encoded(template: str, messages: list[Row], **fields: Any) -> list[str] | str:
    """What is supervised, or why the row is rejected."""
    row = {"messages": copy.deepcopy(messages), **fields}
    if any(message.get("tool_calls") for message in messages):
        row["tools"] = TOOLS
    found = parse_row(SimpleNamespace(name="x.jsonl"), 1, row, "auto")  # pyright: ignore
    found = found if isinstance(found, Reject) else Encoder(TOKENIZER, template, 9999).encode(found)
    return (
        found.reason
        if isinstance(found, Reject)
        else list(map(str, stretches(found.example, TOKENIZER)))
    )


@pytest.mark.parametrize(("template", "messages", "wanted"), CASES)
def test_what_is_supervised(template: str, messages: list[Row], wanted: list[str]) -> None:
    assert encoded(template, messages) == wanted


SPOILERS = ("<|end|></s>", "<|im_end|>\n<|im_start|>assistant\n", "<|assistant|>𗀀\ue000")


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize(("template", "messages", "wanted"), CASES)
def test_texts_of_others_change_nothing(
    template: str, messages: list[Row], wanted: list[str], spoiler: str
) -> None:
    """Whatever users, systems and tools say, also what looks like the template's own."""
    for change in (lambda text: text + spoiler, lambda text: text[:2] + spoiler + text[2:]):
        others = [
            each if each["role"] == "assistant" else each | {"content": change(each["content"])}
            for each in messages
        ]
        assert encoded(template, others) == wanted


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize(("template", "messages", "wanted"), CASES)
def test_a_turn_follows_its_own_text(
    template: str, messages: list[Row], wanted: list[str], spoiler: str
) -> None:
    content = messages[-1]["content"]
    if messages[-1]["role"] == "assistant" and content:
        changed = messages[-1] | {"content": content[:-2] + spoiler + content[-2:]}
        start, end = wanted[-1].rsplit(content[-2:], 1)
        assert encoded(template, [*messages[:-1], changed]) == [
            *wanted[:-1],
            start + spoiler + content[-2:] + end,
        ]


def test_a_template_that_looks_how_a_text_begins() -> None:
    """A mark in front of the tag would hide it from the template."""
    messages = [user("a?"), answer("One."), user("<result>b</result>"), answer("Two.")]
    assert encoded(THINKS, messages) == [
        "\n</think>\n\nOne.<|im_end|>",
        "\n</think>\n\nTwo.<|im_end|>",
    ]


def test_a_template_that_compares_messages() -> None:
    """Mistral: with marks of their own, two equal questions would not be equal."""
    last = "(messages | selectattr('role', 'equalto', 'user') | list)[-1]"
    compares = INSTRUCT.replace("loop.index0 == ns.last", f"m == {last}")
    messages = [*ONE, user("When?"), answer("At nine.")]
    assert encoded(compares, messages) == [
        '[CALL]{"name": "ferry", "arguments": {"pier": "B"}}</s>',
        "At nine.</s>",
        "At nine.</s>",
    ]
    assert encoded(compares, LATER) == encoded(INSTRUCT, LATER)


@pytest.mark.parametrize("template", [PLAIN, TWO_ENDS, PARTS])
def test_calls_that_a_template_does_not_show(template: str) -> None:
    assert encoded(template, ONE) == "the template does not show the tool_calls of messages[1]"


def test_a_template_that_refuses_parallel_calls() -> None:
    reason = "the template fails on this row: one call at a time"
    assert encoded(ONE_CALL, BOTH) == reason


def test_arguments_that_are_not_an_object() -> None:
    reason = encoded(THINKS, [user("When?"), called("B, please")])
    assert isinstance(reason, str)
    assert reason.startswith("the template fails on this row: ")
    assert reason.endswith("messages[1].tool_calls[0].function.arguments is text, not an object")


def test_calls_without_a_template() -> None:
    row = {"messages": ONE, "tools": TOOLS}
    found = parse_row(SimpleNamespace(name="x"), 1, copy.deepcopy(row), "auto")  # pyright: ignore
    rejected = Encoder(TOKENIZER, None, 9999).encode(found)  # pyright: ignore
    assert isinstance(rejected, Reject)
    assert rejected.reason.startswith("--template none does not show the tool_calls of messages[1]")


def test_marks_of_a_template_that_take_in_a_question() -> None:
    template = MARKED.replace("'model: ' + m.content", "messages[0].content + m.content")
    assert encoded(template, TALK[:2]) == (
        "what the template writes for messages[1] holds messages[0].content"
    )


def test_arguments_of_the_template() -> None:
    template = PLAIN.replace("add_generation_prompt", "add_generation_prompt and not quiet")
    template = "{{ '<|quiet|>' if quiet else '<|think|>' }}" + template
    for quiet, token in ((True, "<|quiet|>"), (False, "<|think|>")):
        row = {"messages": TALK[:2], "chat_template_kwargs": {"quiet": quiet}}
        found = parse_row(SimpleNamespace(name="x"), 1, row, "auto")  # pyright: ignore
        example = Encoder(TOKENIZER, template, 9999).encode(found).example  # pyright: ignore
        assert TOKENIZER.decode(example.input_ids[:1]) == token
        assert stretches(example, TOKENIZER) == ["One.<|end|>"]
