"""Which tokens of a rendered conversation are supervised, under templates of every kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .chats import (
    CHATML,
    DEEPSEEK,
    GEMMA,
    GLM,
    LLAMA3,
    MERGING_TOKENIZERS,
    MISTRAL,
    PLAIN,
    QWEN3,
    TOKENIZER,
    byte_tokenizer,
    chat,
    encode,
    message,
    stretches,
    supervised,
)


@pytest.mark.parametrize(
    ("template", "ends", "begins"),
    [
        (CHATML, "<|im_end|>", ""),
        (LLAMA3, "<|eot_id|>", ""),
        (MISTRAL, "</s>", ""),
        (GEMMA, "<end_of_turn>", ""),
        (DEEPSEEK, "<|end_of_sentence|>", ""),
        (GLM, "", ""),
        (PLAIN, "", ""),
    ],
    ids=["chatml", "llama3", "mistral", "gemma", "deepseek", "glm", "plain"],
)
class TestAnyTemplate:
    """What holds for every template that leaves a plain answer as it is."""

    def test_single_turn(self, template, ends, begins):
        assert supervised(template, "Hi?", "Yes.") == [begins + "Yes." + ends]

    def test_every_turn(self, template, ends, begins):
        assert supervised(template, "a?", "One.", "b?", "Two.") == ["One." + ends, "Two." + ends]

    def test_last_turn_only(self, template, ends, begins):
        turns = ("a?", "One.", "b?", "Two.")
        assert supervised(template, *turns, supervise="last") == ["Two." + ends]

    def test_the_same_text_everywhere(self, template, ends, begins):
        assert supervised(template, "Yes.", "Yes.", "Yes.", "Yes.") == ["Yes." + ends] * 2

    def test_answers_that_begin_and_end_alike(self, template, ends, begins):
        turns = ("abc", "abcabc", "abc", "abc", "cabc", "bc")
        assert supervised(template, *turns) == [turn + ends for turn in turns[1::2]]

    def test_beyond_ascii(self, template, ends, begins):
        turns = ("¿Qué? 🙂", "数 👩‍👩‍👧 ﬁn é", "🙂", "🙂🙂")
        assert supervised(template, *turns) == [turn + ends for turn in turns[1::2]]

    def test_private_use_characters(self, template, ends, begins):
        turns = ("\ue000", "\ue000\ue001", "\ue001", "\ue002")
        assert supervised(template, *turns) == [turn + ends for turn in turns[1::2]]

    def test_conversation_that_ends_with_the_user(self, template, ends, begins):
        assert supervised(template, "a?", "One.", "b?") == ["One." + ends]

    def test_all_tokens_but_the_first(self, template, ends, begins):
        example = encode(template, chat("a?", "One.", "b?", "Two."), supervise="all")
        assert example.positions.tolist() == list(range(1, len(example.input_ids)))

    def test_tokens_are_those_of_the_rendered_conversation(self, template, ends, begins):
        demonstration = chat("a?", "One. 🙂", "b?", "Two.")
        text = TOKENIZER.apply_chat_template(
            demonstration.messages, chat_template=template, tokenize=False
        )
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        example = encode(template, demonstration)
        assert example.input_ids.tolist() == ids
        assert (example.input_ids.dtype, example.positions.dtype) == (np.int32, np.int32)
        assert example.id == "demo"


@pytest.mark.parametrize("template", [CHATML, GLM, PLAIN], ids=["chatml", "glm", "plain"])
def test_white_space_that_the_template_keeps(template):
    ends = "<|im_end|>" if template is CHATML else ""
    turns = (" a? \n", "\n  One. \n\n", "\tb?", " Two.\n")
    assert supervised(template, *turns) == [turn + ends for turn in turns[1::2]]


@pytest.mark.parametrize(
    ("template", "ends"),
    [(LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>")],
    ids=["llama3", "gemma"],
)
def test_white_space_that_the_template_trims(template, ends):
    turns = (" a? \n", "\n  One. \n\n", "\tb?", " Two.\n")
    assert supervised(template, *turns) == ["One." + ends, "Two." + ends]


def test_system_message_is_not_supervised():
    turns = (message("system", "Yes."), message("user", "Yes."), message("assistant", "Yes."))
    assert supervised(CHATML, *turns) == ["Yes.<|im_end|>"]


def test_first_token_that_begins_messages_too():
    """SmolLM2: a default system message, and the token of a message begins texts as well."""
    tokenizer = byte_tokenizer(bos_token="<|im_start|>", eos_token="<|im_end|>")
    example = encode(CHATML, chat("a?", "One.", "b?", "Two."), tokenizer=tokenizer)
    assert stretches(example, tokenizer) == ["One.<|im_end|>", "Two.<|im_end|>"]


def test_answers_one_after_another():
    turns = (
        message("user", "a?"),
        message("assistant", "One."),
        message("assistant", "One."),
    )
    assert supervised(CHATML, *turns) == ["One.<|im_end|>"] * 2


def test_conversation_that_begins_with_the_assistant():
    turns = (message("assistant", "Hello."), message("user", "a?"), message("assistant", "One."))
    assert supervised(CHATML, *turns) == ["Hello.<|im_end|>", "One.<|im_end|>"]


def test_special_tokens_inside_the_contents():
    turns = (
        "<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>",
        "One.<|im_end|>\n<|im_start|>user\nb?<|im_end|>",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    )
    assert supervised(CHATML, *turns) == [turn + "<|im_end|>" for turn in turns[1::2]]


def test_text_that_closes_a_turn_at_once_is_its_end():
    """Where the tokenizer has no special token for it, as in a template of one's own."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ '<END>' if m.role == 'assistant' }}\n{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    turns = ("a?", "One.", "b?", "Two.")
    assert supervised(template, *turns) == ["One.<END>", "Two.<END>"]


class TestRewrittenTurns:
    """Qwen3: what the conversation shows of a turn depends on where the last question is."""

    def test_reasoning_is_supervised_where_it_is_shown(self):
        turns = ("a?", "<think>\nhm\n</think>\n\nOne.", "b?", "<think>\noh\n</think>\n\nTwo.")
        assert supervised(QWEN3, *turns) == [
            "One.<|im_end|>",
            "<think>\noh\n</think>\n\nTwo.<|im_end|>",
        ]

    def test_empty_reasoning_that_the_template_writes(self):
        assert supervised(QWEN3, "a?", "One.", "b?", "Two.") == [
            "One.<|im_end|>",
            "<think>\n\n</think>\n\nTwo.<|im_end|>",
        ]

    def test_empty_reasoning_that_the_answer_has(self):
        assert supervised(QWEN3, "a?", "<think>\n\n</think>\n\nOne.") == [
            "<think>\n\n</think>\n\nOne.<|im_end|>"
        ]

    def test_reasoning_in_a_field_of_its_own(self):
        answer = message("assistant", "One.", reasoning_content="hm")
        assert supervised(QWEN3, message("user", "a?"), answer) == [
            "<think>\nhm\n</think>\n\nOne.<|im_end|>"
        ]

    def test_reasoning_that_begins_like_the_empty_one(self):
        answer = message("assistant", "One.", reasoning_content="\n</think>\n\nOh")
        assert supervised(QWEN3, message("user", "a?"), answer) == [
            "<think>\n\n</think>\n\nOh\n</think>\n\nOne.<|im_end|>"
        ]

    def test_last_turn_only(self):
        turns = ("a?", "One.", "b?", "<think>\noh\n</think>\n\nTwo.")
        assert supervised(QWEN3, *turns, supervise="last") == [
            "<think>\noh\n</think>\n\nTwo.<|im_end|>"
        ]

    def test_tool_calls_before_a_rewritten_turn(self):
        """The prompt of the turn after the result shows reasoning that the whole does not."""
        called = message("assistant", "", reasoning_content="look", tool_calls=[{"name": "clock"}])
        turns = (
            message("user", "Time?"),
            called,
            message("tool", "noon"),
            message("assistant", "Noon.", reasoning_content="easy"),
            message("user", "b?"),
            message("assistant", "Two.", reasoning_content="oh"),
        )
        assert supervised(QWEN3, *turns) == [
            "<call>clock</call><|im_end|>",
            "Noon.<|im_end|>",
            "<think>\noh\n</think>\n\nTwo.<|im_end|>",
        ]
        assert supervised(QWEN3, *turns[:4]) == [
            "<think>\nlook\n</think>\n\n<call>clock</call><|im_end|>",
            "<think>\neasy\n</think>\n\nNoon.<|im_end|>",
        ]

    def test_users_who_quote_the_generation_prompt(self):
        quote = "b?<|im_end|>\n<|im_start|>assistant\n"
        assert supervised(QWEN3, quote, "One.", quote + "x", "Two.") == [
            "One.<|im_end|>",
            "<think>\n\n</think>\n\nTwo.<|im_end|>",
        ]


class TestHiddenReasoning:
    """DeepSeek: the generation prompt is not part of the conversation, reasoning never is."""

    def test_reasoning_is_dropped_from_every_turn(self):
        turns = ("a?", "<think>hm</think>One.", "b?", "<think>oh</think>Two.")
        ends = "<|end_of_sentence|>"
        assert supervised(DEEPSEEK, *turns) == ["One." + ends, "Two." + ends]

    def test_users_who_quote_the_generation_prompt(self):
        turns = ("say <|Assistant|><think>\nhm", "One.", "<|Assistant|><think>\n", "Two.")
        ends = "<|end_of_sentence|>"
        assert supervised(DEEPSEEK, *turns) == ["One." + ends, "Two." + ends]

    def test_a_prompt_that_opens_the_reasoning_is_not_supervised(self):
        """What stands in the prompt is given to the model, also where the answer repeats it."""
        kept = DEEPSEEK.replace(".split('</think>')[-1]", "")
        assert supervised(kept, "a?", "<think>\nhm</think>One.") == [
            "hm</think>One.<|end_of_sentence|>"
        ]


class TestToolCalls:
    CALL = message("assistant", "", tool_calls=[{"name": "clock"}])

    def test_a_template_that_refuses_a_result_without_a_call(self):
        turns = (message("user", "Time?"), self.CALL, message("tool", "noon"))
        assert supervised(MISTRAL, *turns, message("assistant", "Noon.")) == [
            "[TOOL_CALLS]clock</s>",
            "Noon.</s>",
        ]

    def test_tools_reach_the_template(self):
        with_tools = "{{ tools[0].function.name }}" + CHATML
        tools = [{"type": "function", "function": {"name": "clock"}}]
        example = encode(with_tools, chat("a?", "One.", tools=tools))
        assert TOKENIZER.decode(example.input_ids).startswith("clock<|im_start|>system")
        assert stretches(example) == ["One.<|im_end|>"]


def test_space_before_the_answer_belongs_to_its_first_word():
    """Mistral separates prompt and answer with a space, which the first token takes in."""
    tokenizer = MERGING_TOKENIZERS[0]
    example = encode(MISTRAL, chat("hello", "good day"), tokenizer=tokenizer)
    assert stretches(example, tokenizer) == [" good day</s>"]


def test_end_token_after_white_space():
    spaced = MISTRAL.replace("m.content + '</s>'", "m.content + ' </s><s>'")
    assert supervised(spaced, "a?", "One.", "b?", "Two.") == ["One. </s>", "Two. </s>"]


def test_end_token_at_the_end_of_the_conversation_only():
    once = GLM + "{{ '</s>' }}"
    assert supervised(once, "a?", "One.", "b?", "Two.") == ["One.", "Two.</s>"]


def test_template_without_a_generation_prompt():
    template = CHATML.split("{%- if add_generation_prompt")[0]
    assert supervised(template, "a?", "One.", "b?", "Two.") == ["One.<|im_end|>", "Two.<|im_end|>"]


def test_template_that_leaves_a_turn_out():
    last_two = CHATML.replace("for m in messages", "for m in messages[-2:]")
    assert supervised(last_two, "a?", "One.", "b?", "Two.") == ["Two.<|im_end|>"]


@pytest.mark.parametrize("tokenizer", MERGING_TOKENIZERS, ids=["whole", "trimmed"])
def test_tokens_of_words_and_of_parts_of_characters(tokenizer):
    example = encode(CHATML, chat("hello 🙂", " yes 🙂 it is", "good", "🙂"), tokenizer=tokenizer)
    assert stretches(example, tokenizer) == [" yes 🙂 it is<|im_end|>", "🙂<|im_end|>"]


def test_tokens_of_spaces_whose_offsets_are_trimmed():
    """Indentation: the offsets of Llama 3 leave such tokens without width."""
    tokenizer = MERGING_TOKENIZERS[1]
    answer = "  if good:\n        yes  \n   "
    example = encode(GLM, chat("hello  ", answer, " hello", " yes "), tokenizer=tokenizer)
    assert stretches(example, tokenizer) == [answer, " yes "]


def test_token_across_the_start_of_the_answer_counts():
    tokenizer = MERGING_TOKENIZERS[0]
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    example = encode(CHATML, chat("hello", "\n\nyes"), tokenizer=tokenizer)
    assert stretches(example, tokenizer) == ["\n\n\nyes<|im_end|>"]


# --- properties --------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        "a",
        "Yes.",
        " ",
        "\n",
        "🙂",
        "é",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "assistant",
        "\ue000",
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=6).map("".join)
CONVERSATIONS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), min_size=1).map(
    lambda turns: [*turns, ("assistant", "end")]
)


def pieces_to_tokens(pieces):
    """Ids and supervised positions of (text, is supervised) pieces, each tokenised by itself."""
    ids, mask = [], []
    for text, counts in pieces:
        piece = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [counts] * len(piece)
    return ids, [i for i, counts in enumerate(mask) if counts and i]


def assert_pieces(template, turns, pieces):
    example = encode(template, chat(*[message(role, text) for role, text in turns]))
    ids, positions = pieces_to_tokens(pieces)
    assert example.input_ids.tolist() == ids
    assert example.positions.tolist() == positions


@given(CONVERSATIONS)
@settings(max_examples=150, deadline=None)
def test_any_conversation_under_chatml(turns):
    pieces = [("<|im_start|>system\nBe kind.<|im_end|>\n", False)]
    for role, text in turns:
        answers = role == "assistant" and text.strip() != ""
        header = (f"<|im_start|>{role}\n", False)
        pieces += [header, (text, answers), ("<|im_end|>", answers), ("\n", False)]
    assert_pieces(CHATML, turns, pieces)


@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_conversation_under_a_template_that_rewrites(pairs):
    turns, pieces = [], []
    for i, (question, answer) in enumerate(pairs):
        turns += [("user", question), ("assistant", answer)]
        thought = "<think>\n\n</think>\n\n" if i == len(pairs) - 1 else ""
        pieces += [
            (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False),
            (f"{thought}{answer}<|im_end|>", True),
            ("\n", False),
        ]
    assert_pieces(QWEN3, turns, pieces)


@given(CONVERSATIONS)
@settings(max_examples=50, deadline=None)
def test_trimmed_offsets_make_no_difference(turns):
    demonstration = chat(*[message(role, text) for role, text in turns])
    plain, trimmed = (
        encode(CHATML, demonstration, tokenizer=tokenizer) for tokenizer in MERGING_TOKENIZERS
    )
    assert trimmed.input_ids.tolist() == plain.input_ids.tolist()
    assert trimmed.positions.tolist() == plain.positions.tolist()
