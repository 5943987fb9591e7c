"""Conversations without a template, limits, rejects, and the template and tokenizer themselves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import Reject
from qpipe.stages.encoding.encoder import Encoded
from qpipe.stages.encoding.template import load_template, load_tools_template
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from .chats import (
    CHATML,
    GEMMA,
    MERGING_TOKENIZERS,
    QWEN3,
    TOKENIZER,
    byte_tokenizer,
    chat,
    encode,
    encoder,
    stretches,
    supervised,
)

TOOLS = "{{ tools | tojson }}"
NEVER_ENDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


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
        "chats.jsonl", 7, "the template fails on this row: roles must alternate"
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

    def test_named_ones_are_chosen_as_transformers_does(self):
        """The default, for tools the template of that use, and others by their name."""
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = {"default": CHATML, "tool_use": TOOLS + CHATML, "rag": GEMMA}
        default, tools = (
            load("tokenizer", tokenizer) for load in (load_template, load_tools_template)
        )
        assert (default, tools) == (CHATML, TOOLS + CHATML)
        for given in (None, [{"type": "function", "function": {"name": "clock"}}]):
            example = encode(default, chat("a?", "One.", tools=given), tools_template=tools)
            expected = tokenizer.apply_chat_template(
                chat("a?", "One.").messages, tools=given, tokenize=False
            )
            assert TOKENIZER.decode(example.input_ids) == expected
        assert load_template("rag", tokenizer) == GEMMA
        assert load_tools_template("rag", tokenizer) is None

    def test_named_ones_without_a_default(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = {"tool_use": CHATML, "rag": GEMMA}
        with pytest.raises(UserError, match="has the templates rag, tool_use and none of the name"):
            load_template("tokenizer", tokenizer)

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


@pytest.mark.parametrize(
    ("template", "answers", "never_ends"),
    [
        (NEVER_ENDS, ("One.",), True),
        (NEVER_ENDS, ("One.", "Two."), True),
        (CHATML, ("One.",), False),
        (None, ("One.",), False),
    ],
)
def test_templates_without_an_end_are_noticed(template, answers, never_ends):
    turns = [turn for answer in answers for turn in ("a?", answer)]
    encoded = encoder(template).encode(chat(*turns))
    assert encoded.never_ends == never_ends


def test_tokenizer_without_offsets():
    class SlowTokenizer:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(UserError, match="some/model has no character offsets"):
        encoder(CHATML, SlowTokenizer())


def test_a_text_of_megabytes_is_not_tokenised_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning alone has too many tokens."""
    lengths: list[int] = []
    tokenise = PreTrainedTokenizerFast.__call__

    def count(self: PreTrainedTokenizerFast, texts: list[str], **options: Any) -> Any:
        lengths.extend(map(len, texts))
        return tokenise(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    found = encoder(CHATML, max_length=4096).encode(chat("a?", "x" * 4_000_000))
    assert isinstance(found, Reject)
    assert found.reason == "more than 65485 tokens, --max-length is 4096"
    assert max(lengths) == 65536
    # of what is not too long every token counts
    whole = encoder(CHATML, max_length=200_000).encode(chat("a?", "x" * 100_000))
    assert isinstance(whole, Encoded)


@pytest.mark.parametrize("characters", [1, 2**19])
def test_several_are_encoded_as_each_alone(
    characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, whatever the batches are; rejects stay where they are."""
    monkeypatch.setattr("qpipe.stages.encoding.encoder.BATCH_CHARACTERS", characters)
    made = encoder(CHATML, max_length=300, tools_template=CHATML.replace("user", "User"))
    earlier = Reject("other", 7, "not JSON")
    tools = replace(chat("a user?", "One."), tools=[{"type": "function"}])
    given = [chat("a?", "One."), earlier, tools, chat("b?", "x" * 300), chat("c?", "Two.")]
    found = list(made.encode_all(given))
    assert [isinstance(each, Reject) for each in found] == [False, True, False, True, False]
    assert found[1] is earlier
    for one, all_together in zip(given, found, strict=True):
        alone = earlier if isinstance(one, Reject) else made.encode(one)
        if isinstance(alone, Reject):
            assert all_together == alone
        else:
            assert isinstance(all_together, Encoded)
            for name in ("input_ids", "positions", "token_weights"):
                ours, theirs = (getattr(each.example, name) for each in (all_together, alone))
                assert ours.tolist() == theirs.tolist()
    assert list(made.encode_all([])) == []


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__['os'].mkdir('ran') }}",
        "{{ messages.clear() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_stays_in_its_sandbox(
    hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = encoder(CHATML + hostile).encode(chat("a?", "One."))
    assert isinstance(found, Reject)
    assert "the template fails on this row" in found.reason
    assert list(tmp_path.iterdir()) == []
