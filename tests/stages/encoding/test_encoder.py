"""Which tokens are supervised, against answers worked out by hand.

Most tests use a tokenizer of single bytes and special tokens, so that the decoded supervised tokens
are exactly the supervised characters. The templates imitate what well-known families do.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import Reject
from qpipe.stages.demonstrations.demonstration import Demonstration
from qpipe.stages.encoding.encoder import Encoded, Encoder
from qpipe.stages.encoding.template import load_template
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<start_of_turn>", "<end_of_turn>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
]

CHATML = """{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA3 = """{{ '<|begin_of_text|>' }}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}"""

MISTRAL = """{{ '<s>' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'tool' -%}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls -%}{{ '[TOOL_CALLS]' + m.tool_calls[0].name + '</s>' }}
{%- elif loop.nextitem is defined and loop.nextitem.role == 'tool' -%}
{{ raise_exception('a result without a call') }}
{%- else -%}{{ ' ' + m.content + '</s>' }}
{%- endif -%}
{%- endfor -%}"""

GEMMA = """{{ '<s>' }}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

# Reasoning is dropped before the last question, and written, empty if need be, after it.
QWEN3 = """{%- set ns = namespace(question=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- set content = m.content -%}
{%- if m.role == 'assistant' -%}
{%- set reasoning = m.reasoning_content or '' -%}
{%- if '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.question -%}
{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
{{ content }}
{%- for call in m.tool_calls or [] -%}{{ '<call>' + call.name + '</call>' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# The generation prompt opens the reasoning, which no turn of the conversation then shows.
DEEPSEEK = """{{ '<s>' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|User|>' + m.content }}
{%- else -%}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\\n' }}{%- endif -%}"""

GLM = """{{ '[gMASK]<sop>' }}
{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

PLAIN = """{%- for m in messages -%}
{{ ('### Instruction:\\n' if m.role == 'user' else '### Response:\\n') + m.content + '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"""


def byte_tokenizer(**special_tokens):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    return _finished(tokenizer, **special_tokens)


def _finished(tokenizer, **special_tokens):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def merging_tokenizer(trim_offsets):
    """Byte-level BPE that has learnt whole words, with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["yes yes it is good good day hello hello world assistant user\n\n\n"] * 3,
        trainers.BpeTrainer(
            vocab_size=340,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _finished(tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZER = byte_tokenizer(bos_token="<s>", eos_token="</s>")
MERGING_TOKENIZERS = [merging_tokenizer(trim_offsets) for trim_offsets in (False, True)]


def chat(*turns, **fields):
    """A demonstration; the turns are the user's and the assistant's by turns, or whole messages."""
    roles = ("user", "assistant")
    messages = [
        turn if isinstance(turn, dict) else {"role": roles[i % 2], "content": turn}
        for i, turn in enumerate(turns)
    ]
    return Demonstration("demo", messages, fields.get("tools"), "chats.jsonl", 7)


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def encoder(template, tokenizer=TOKENIZER, max_length=10_000, **options):
    return Encoder(tokenizer, template, max_length=max_length, **options)


def encode(template, demonstration, **options):
    encoded = encoder(template, **options).encode(demonstration)
    assert isinstance(encoded, Encoded), encoded
    return encoded.example


def stretches(example, tokenizer=TOKENIZER):
    """The text of each run of supervised tokens."""
    breaks = np.flatnonzero(np.diff(example.positions) > 1) + 1
    return [tokenizer.decode(example.input_ids[run]) for run in np.split(example.positions, breaks)]


def supervised(template, *turns, **options):
    return stretches(encode(template, chat(*turns), **options))


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
    example = encode(GLM, chat("hello  ", answer, " hello", " "), tokenizer=tokenizer)
    assert stretches(example, tokenizer) == [answer, " "]


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
        answers = role == "assistant"
        header = (f"<|im_start|>{role}\n", False)
        pieces += [header, (text, answers), ("<|im_end|>", answers), ("\n", False)]
    assert_pieces(CHATML, turns, pieces)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
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


# --- no template -------------------------------------------------------------------------------


def with_bos(tokenizer, end=""):
    """The tokenizer, adding its first token by itself, and its last where `end` names it."""
    ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}".strip(), special_tokens=ids
    )
    return tokenizer


class TestNoTemplate:
    def test_contents_and_the_end_token(self):
        example = encode(None, chat("Q: 1+1? A:", " 2"))
        assert TOKENIZER.decode(example.input_ids) == "Q: 1+1? A: 2</s>"
        assert stretches(example) == [" 2</s>"]

    def test_every_answer_is_ended(self):
        example = encode(None, chat("a?", "One.", "b?", "Two."))
        assert TOKENIZER.decode(example.input_ids) == "a?One.</s>b?Two.</s>"
        assert stretches(example) == ["One.</s>", "Two.</s>"]

    def test_end_token_that_is_there_already(self):
        assert supervised(None, "a?", "One.</s>") == ["One.</s>"]

    def test_first_token_of_the_tokenizer(self):
        tokenizer = with_bos(byte_tokenizer(bos_token="<s>", eos_token="</s>"))
        example = encode(None, chat("", "One."), tokenizer=tokenizer)
        assert tokenizer.decode(example.input_ids) == "<s>One.</s>"
        assert stretches(example, tokenizer) == ["One.</s>"]

    def test_tokenizer_that_ends_by_itself(self):
        tokenizer = with_bos(byte_tokenizer(bos_token="<s>", eos_token="</s>"), end="</s>")
        example = encode(None, chat("a?", "One."), tokenizer=tokenizer)
        assert tokenizer.decode(example.input_ids) == "<s>a?One.</s>"
        assert stretches(example, tokenizer) == ["One.</s>"]

    def test_template_brings_its_own_first_token(self):
        tokenizer = with_bos(byte_tokenizer(bos_token="<s>", eos_token="</s>"), end="</s>")
        example = encode(GEMMA, chat("a?", "One."), tokenizer=tokenizer)
        assert tokenizer.decode(example.input_ids).count("<s>") == 1
        assert stretches(example, tokenizer) == ["One.<end_of_turn>"]

    def test_prompt_and_completion_share_a_token_at_most(self):
        tokenizer = MERGING_TOKENIZERS[1]
        example = encode(None, chat("hello ", "world"), tokenizer=tokenizer)
        assert stretches(example, tokenizer)[0].strip() == "world</s>"

    def test_nothing_to_predict_the_first_token_from(self):
        example = encode(None, chat("", "One."))
        assert example.positions.tolist() == [1, 2, 3, 4]

    def test_tokenizer_without_an_end_token(self):
        with pytest.raises(UserError, match=r"no end-of-sequence token.*--template FILE"):
            encoder(None, byte_tokenizer())

    def test_end_token_that_is_several_tokens(self):
        tokenizer = byte_tokenizer(eos_token="</s>")
        tokenizer.encode = lambda *_, **__: [1, 2]
        with pytest.raises(UserError, match="does not read its end-of-sequence token '</s>'"):
            encoder(None, tokenizer)


# --- length and rejects ------------------------------------------------------------------------


class TestLength:
    DEMO = chat("a?", "One.", "b?", "Two.")  # 17 tokens without a template: 2+5, 2+5

    def reason(self, **options):
        encoded = encoder(None, **options).encode(self.DEMO)
        assert isinstance(encoded, Reject)
        assert (encoded.source, encoded.line) == ("chats.jsonl", 7)
        return encoded.reason

    def test_at_the_limit(self):
        for too_long in ("reject", "cut"):
            encoded = encoder(None, max_length=14, too_long=too_long).encode(self.DEMO)
            assert isinstance(encoded, Encoded)
            assert len(encoded.example.input_ids) == 14
            assert not encoded.cut

    def test_tokens_that_the_model_does_not_have(self):
        highest = int(encoder(None, max_length=14).encode(self.DEMO).example.input_ids.max())
        words = f"a token is outside the model's vocabulary of {highest}"
        assert self.reason(max_length=14, vocab_size=highest) == words
        fitting = encoder(None, max_length=14, vocab_size=highest + 1)
        assert isinstance(fitting.encode(self.DEMO), Encoded)

    def test_rejected(self):
        assert self.reason(max_length=13) == "14 tokens, --max-length is 13"

    def test_cut(self):
        encoded = encoder(None, max_length=5, too_long="cut").encode(self.DEMO)
        assert isinstance(encoded, Encoded)
        assert encoded.cut
        assert TOKENIZER.decode(encoded.example.input_ids) == "a?One"
        assert encoded.example.positions.tolist() == [2, 3, 4]

    def test_nothing_left_after_the_cut(self):
        reason = self.reason(max_length=2, too_long="cut")
        assert reason == "no supervised token among the first 2"


def test_template_that_refuses_a_conversation():
    template = "{{ raise_exception('roles must\nalternate') }}"
    assert encoder(template).encode(chat("a?", "One.")) == Reject(
        "chats.jsonl", 7, "the chat template says: roles must alternate"
    )


def test_template_that_shows_nothing_of_the_answer():
    assert encoder("{{ messages[0].content }}").encode(chat("a?", "One.")) == Reject(
        "chats.jsonl", 7, "no supervised token"
    )


def test_empty_rendering():
    rejected = encoder("{{ '' }}", supervise="all").encode(chat("a?", "One."))
    assert rejected == Reject("chats.jsonl", 7, "no supervised token")


def test_the_demonstration_is_left_as_it_is():
    demonstration = chat("a?", "<think>\nhm\n</think>\n\nOne.", "b?", "Two.")
    before = [dict(message) for message in demonstration.messages]
    encode(QWEN3, demonstration)
    assert demonstration == replace(demonstration, messages=before)


# --- the template and the tokenizer ------------------------------------------------------------


class TestLoadTemplate:
    def test_none(self):
        assert load_template("none", TOKENIZER) is None

    def test_the_tokenizer_s_own(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHATML
        assert load_template("tokenizer", tokenizer) == CHATML

    def test_the_tokenizer_has_none(self):
        with pytest.raises(
            UserError, match=r"no chat template.*--template FILE, or --template none"
        ):
            load_template("tokenizer", TOKENIZER)

    def test_a_file(self, tmp_path):
        for name, template in (("chatml.jinja", CHATML), ("raises.jinja", "{{ messages[9].x.y }}")):
            (tmp_path / name).write_text(template)
            assert load_template(str(tmp_path / name), TOKENIZER) == template

    def test_no_such_file(self):
        with pytest.raises(UserError, match=r"template chatml.jinja: no such file"):
            load_template("chatml.jinja", TOKENIZER)

    @pytest.mark.parametrize("text", ["\n{% for %}", "\n{{ messages | nosuchfilter }}"])
    def test_not_jinja(self, tmp_path, text):
        (tmp_path / "broken.jinja").write_text(text)
        with pytest.raises(UserError, match=r"broken.jinja, line 2: not a Jinja template"):
            load_template(str(tmp_path / "broken.jinja"), TOKENIZER)

    @pytest.mark.parametrize("name", ["latin.jinja", "."])
    def test_unreadable(self, tmp_path, name):
        (tmp_path / "latin.jinja").write_bytes(b"\xe9")
        with pytest.raises(UserError, match="cannot be read"):
            load_template(str(tmp_path / name), TOKENIZER)


def test_tokenizer_without_offsets():
    class SlowTokenizer:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(UserError, match="some/model has no character offsets"):
        encoder(CHATML, SlowTokenizer())
