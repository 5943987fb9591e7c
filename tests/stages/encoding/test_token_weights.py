"""The weights of turns, spans and contents, token by token."""

from types import SimpleNamespace

import pytest
from qpipe.stages.demonstrations.formats import parse_row
from qpipe.stages.encoding.content import Kept, find_kept
from qpipe.stages.encoding.encoder import Encoder, _Renderer

from .chats import QWEN3
from .weighed import (
    CALLS,
    END,
    HIDES,
    KEEPS,
    LAST_TWO,
    REPEATS,
    SHOUTS,
    TRIMMED_WORDS,
    TRIMS,
    WORDS,
    answer,
    byte_tokenizer,
    encode,
    refused,
    told,
    user,
)


class TestWeightOfATurn:
    def test_nothing_given(self):
        assert told(KEEPS, user("a?"), answer("One.")) == [("One." + END, 1)]

    def test_of_every_token_of_the_turn(self):
        assert told(KEEPS, user("a?"), answer("One.", weight=0.5)) == [("One." + END, 0.5)]

    def test_of_each_turn(self):
        turns = (user("a?"), answer("One.", weight=0), user("b?"), answer("Two.", weight=1))
        assert told(KEEPS, *turns) == [("Two." + END, 1)]

    def test_of_what_the_template_writes_in_the_turn(self):
        turns = (user("a?"), answer("One.", weight=3))
        assert told(QWEN3, *turns) == [("<think>\n\n</think>\n\nOne." + END, 3)]

    def test_of_a_user_is_ignored(self):
        for weight in (0, -1, "heavy"):
            turns = (user("a?") | {"weight": weight}, answer("One."))
            for supervise, text in (("assistant", "One." + END), ("last", "One." + END)):
                assert told(KEEPS, *turns, supervise=supervise) == [(text, 1)]
            whole = told(KEEPS, *turns, supervise="all")
            assert [weight for _, weight in whole] == [1]

    def test_of_a_turn_that_is_left_out(self):
        turns = (user("a?"), answer("One.", weight=2), user("b?"), answer("Two.", weight=3))
        assert told(LAST_TWO, *turns) == [("Two." + END, 3)]

    def test_of_a_turn_that_calls_a_tool(self):
        call = answer("", tool_calls=[{"name": "clock"}], weight=2)
        turns = (user("a?"), call, {"role": "tool", "content": "noon"}, answer("Noon."))
        assert told(CALLS, *turns) == [("clock</s>", 2), ("Noon.</s>", 1)]


CONTENT = "Two or three"
SPANS = [[0, 3], [7, 12, 2.5]]
ALL_ZERO = "every supervised token has the weight 0"
PLACED = [("Two", 1), ("three", 2.5)]


class TestSpans:
    def test_as_lists_or_by_name_in_any_order(self):
        by_name = [{"start": 7, "end": 12, "weight": 2.5}, {"start": 0, "end": 3}]
        for spans in (SPANS, SPANS[::-1], by_name):
            assert told(KEEPS, user("a?"), answer(CONTENT, spans=spans)) == PLACED

    def test_weight_of_the_rest_of_the_turn(self):
        turns = (user("a?"), answer(CONTENT, spans=SPANS, weight=0.25))
        assert told(KEEPS, *turns) == [
            ("Two", 1),
            (" or ", 0.25),
            ("three", 2.5),
            (END, 0.25),
        ]

    def test_none_of_the_turn(self):
        assert refused(KEEPS, user("a?"), answer("One.", spans=[])) == ALL_ZERO
        turns = (user("a?"), answer("One.", spans=[], weight=4))
        assert told(KEEPS, *turns) == [("One." + END, 4)]

    def test_side_by_side(self):
        turns = (user("a?"), answer("abcd", spans=[[1, 2, 2], [2, 4, 3]]))
        assert told(KEEPS, *turns) == [("b", 2), ("cd", 3)]

    def test_characters_of_several_bytes_and_tokens(self):
        turns = (user("🙂?"), answer("é🙂数x", spans=[[1, 2, 5], [3, 4, 7]]))
        assert told(KEEPS, *turns) == [("🙂", 5), ("x", 7)]

    def test_the_same_text_elsewhere(self):
        turns = (user(CONTENT), answer(CONTENT), user(CONTENT), answer(CONTENT, spans=SPANS))
        assert told(KEEPS, *turns) == [(CONTENT + END, 1), *PLACED]
        turns = (user(CONTENT), answer(CONTENT, spans=SPANS), user(CONTENT), answer(CONTENT))
        assert told(KEEPS, *turns) == [*PLACED, (CONTENT + END, 1)]

    def test_without_a_template(self):
        turns = (user("a?"), answer(CONTENT, spans=SPANS), user("b?"), answer("</s>", spans=[]))
        assert told(None, *turns) == PLACED

    @pytest.mark.parametrize("template", [KEEPS, TRIMS, HIDES, QWEN3])
    def test_white_space_about_the_content(self, template):
        turns = (user("a?"), answer(f" \n {CONTENT} \n", spans=[[3, 6], [10, 15, 2.5]]), user("b?"))
        assert told(template, *turns) == PLACED

    def test_white_space_that_is_trimmed_off_the_edges(self):
        turns = (user("a?"), answer(" \n One. \n", spans=[[0, 9, 2]]))
        assert told(TRIMS, *turns) == [("One.", 2)]
        assert told(KEEPS, *turns) == [(" \n One. \n", 2)]

    def test_nothing_but_white_space_that_is_trimmed(self):
        turns = (user("a?"), answer(" \n One. \n", spans=[[0, 2, 2]]))
        assert told(KEEPS, *turns) == [(" \n", 2)]
        assert refused(TRIMS, *turns) == (
            "the template drops characters 0-2 of messages[1].content, which span [0, 2] covers: "
            "leave them out of it"
        )


class TestReasoning:
    """Contents that a template shows in part, by where their conversation has its last question."""

    THOUGHT = "<think>\nhm\n</think>\n\nOne."  # hm from 8, </think> from 11, One. from 21

    def test_in_the_answer(self):
        turns = (user("a?"), answer(self.THOUGHT, spans=[[21, 24, 2]]))
        placed = [("One", 2)]
        assert told(QWEN3, *turns) == placed
        assert told(QWEN3, *turns, user("b?")) == placed
        assert told(HIDES, *turns) == placed

    def test_in_the_reasoning_where_it_is_shown(self):
        turns = (user("a?"), answer(self.THOUGHT, spans=[[0, 7], [8, 10, 3]], weight=0.5))
        assert told(QWEN3, *turns) == [
            ("<think>", 1),
            ("\n", 0.5),
            ("hm", 3),
            ("\n</think>\n\nOne." + END, 0.5),
        ]

    def test_in_the_reasoning_where_it_is_dropped(self):
        turns = (user("a?"), answer(self.THOUGHT, spans=[[8, 10, 3]]), user("b?"))
        assert refused(QWEN3, *turns) == (
            "the template drops characters 8-10 of messages[1].content, which span [8, 10] "
            "covers: leave them out of it"
        )

    def test_across_what_is_dropped_and_what_is_shown(self):
        turns = (user("a?"), answer(self.THOUGHT, spans=[[8, 24]]), user("b?"))
        assert "drops characters 8-21 of messages[1].content, which span [8, 24]" in refused(
            QWEN3, *turns
        )

    def test_white_space_that_is_dropped_with_it(self):
        turns = (user("a?"), answer(self.THOUGHT, spans=[[19, 24, 2]]), user("b?"))
        assert told(QWEN3, *turns) == [("One", 2)]

    def test_that_says_what_the_answer_says(self):
        """Which of the two the template shows cannot be seen."""
        turns = (user("a?"), answer("<think>One.</think>One.", spans=[[19, 22]]))
        assert refused(HIDES, *turns) == (
            "the template rewrites messages[1].content, so the place of its spans is not known: "
            "leave them out, or write the content as the template does"
        )
        whole = answer("<think>\nOne.\n</think>\n\nOne.", spans=[[23, 26, 2]])
        assert told(QWEN3, user("a?"), whole) == [("One", 2)]

    def test_in_a_field_of_its_own(self):
        turn = answer("One.", reasoning_content="One. hm", spans=[[0, 3, 2]])
        assert told(QWEN3, user("a?"), turn) == [
            ("One", 2),
        ]

    def test_that_the_prompt_opens_is_not_the_model_s(self):
        opens = KEEPS.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")
        turns = (user("a?"), answer(self.THOUGHT, spans=[[0, 10, 2]]))
        assert told(opens, *turns) == [("hm", 2)]
        turns = (user("a?"), answer(self.THOUGHT, spans=[[0, 7]]))
        assert refused(opens, *turns) == (
            "span [0, 7] of messages[1] holds no token of what the model writes: let it hold one, "
            "or leave it out"
        )


class TestContentThatIsNotShown:
    @pytest.mark.parametrize("template", [SHOUTS, REPEATS])
    def test_rewritten(self, template):
        reason = refused(template, user("a?"), answer("One.", spans=[[0, 3]]))
        assert reason.startswith("the template rewrites messages[1].content, so the place of its")
        assert told(template, user("a?"), answer("One.", weight=2))[0][1] == 2

    @pytest.mark.parametrize("fields", [{"spans": [[0, 3]]}, {"token_weights": [1, 1, 1, 2]}])
    def test_left_out(self, fields):
        turns = (user("a?"), answer("One.", **fields), user("b?"), answer("Two."))
        assert refused(LAST_TWO, *turns) == (
            f"the template leaves messages[1] out, and its {next(iter(fields))} with it"
        )
        assert told(LAST_TWO, *turns, supervise="last") == [("Two." + END, 1)]

    def test_beside_a_tool_call(self):
        call = answer("Wait.", tool_calls=[{"name": "clock"}], spans=[[0, 4, 2]])
        assert told(QWEN3, user("a?"), call) == [
            ("Wait", 2),
        ]
        assert "rewrites messages[1].content" in refused(CALLS, user("a?"), call)
        alike = answer("die", tool_calls=[{"name": "die"}], spans=[[0, 3]])
        unclosed = CALLS.replace("{{ '</s>' }}", "")
        assert "rewrites messages[1].content" in refused(unclosed, user("a?"), alike)

    def test_tokens_beside_a_tool_call(self):
        def call(*weights, content=""):
            return answer(content, tool_calls=[{"name": "die"}], token_weights=list(weights))

        assert told(CALLS, user("a?"), call(1, 2, 3, 4)) == [
            ("d", 1),
            ("i", 2),
            ("e", 3),
            ("</s>", 4),
        ]
        assert told(QWEN3, user("a?"), call())[0][1] == 1
        assert refused(CALLS, user("a?"), call(1, 2, content="so")) == (
            "messages[1].token_weights has 2 numbers, its turn has 4 tokens, how many of them its "
            "content has is not known, since the template rewrites it: give one for each"
        )


def with_spans(content, *spans, **fields):
    return (user("hello"), answer(content, spans=[list(span) for span in spans], **fields))


@pytest.mark.parametrize("tokenizer", [WORDS, TRIMMED_WORDS], ids=["whole", "trimmed"])
class TestTokensOfSeveralCharacters:
    """Tokens here: hello, " good", " day", runs of spaces, and what the template has."""

    def test_the_space_before_a_word_does_not_count(self, tokenizer):
        content = "hello good day"
        wanted = [(" good", 2)]
        for span in ((6, 10, 2), (5, 10, 2), (5, 11, 2), (6, 11, 2)):
            assert told(KEEPS, *with_spans(content, span), tokenizer=tokenizer) == wanted

    def test_span_that_cuts_a_token(self, tokenizer):
        turns = with_spans("hello good day", (0, 5), (7, 10))
        token, first = ("good", 6) if tokenizer is TRIMMED_WORDS else (" good", 5)
        assert refused(KEEPS, *turns, tokenizer=tokenizer) == (
            f"span [7, 10] of messages[1] cuts the token {token!r}, characters {first}-10: take in "
            "all of it, or nothing"
        )
        for span in ((0, 4), (0, 8), (6, 12), (12, 14)):
            reason = refused(KEEPS, *with_spans("hello good day", span), tokenizer=tokenizer)
            assert reason.startswith(f"span [{span[0]}, {span[1]}] of messages[1] cuts the token")

    def test_two_spans_that_share_a_token(self, tokenizer):
        turns = with_spans("hello", (0, 2, 1), (2, 5, 1))
        reason = refused(KEEPS, *turns, tokenizer=tokenizer)
        assert reason.startswith("span [0, 2] of messages[1] cuts the token 'hello', characters 0-")

    def test_token_of_white_space(self, tokenizer):
        """Two of these spaces are a token of their own, the third is that of the word."""
        content = "hello   good"
        wanted = [("  ", 3)]
        for span in ((5, 7, 3), (5, 8, 3)):
            assert told(KEEPS, *with_spans(content, span), tokenizer=tokenizer) == wanted
        assert refused(KEEPS, *with_spans(content, (0, 6)), tokenizer=tokenizer) == (
            "span [0, 6] of messages[1] cuts the token '  ', characters 5-7: take in all of it, "
            "or nothing"
        )

    def test_span_without_a_token_of_its_own(self, tokenizer):
        turns = with_spans("hello good", (5, 6))
        assert refused(KEEPS, *turns, tokenizer=tokenizer) == (
            "span [5, 6] of messages[1] holds no token of what the model writes: let it hold one, "
            "or leave it out"
        )

    def test_token_that_begins_before_the_answer(self, tokenizer):
        """Without a template, prompt and answer may share one."""
        turns = (user("hel"), answer("lo", spans=[[0, 2]]))
        assert refused(None, *turns, tokenizer=tokenizer) == (
            "span [0, 2] of messages[1] cuts the token 'hello', characters -3-2: take in all of "
            "it, or nothing"
        )

    def test_token_of_two_turns(self, tokenizer):
        joined = "{% for m in messages %}{{ m.content }}{% endfor %}"
        turns = [user("a"), answer("hel", weight=2), answer("lo", weight=2)]
        assert told(joined, *turns, tokenizer=tokenizer) == [("hello", 2)]
        turns[1] = answer("hel")
        assert refused(joined, *turns, tokenizer=tokenizer) == (
            "the token 'hello' belongs to messages[2] and to a turn before it, whose weights "
            "differ: give both the same"
        )


class TestTokenWeights:
    def test_of_the_content(self):
        turns = (user("a?"), answer("One.", token_weights=[4, 2, 3.5, 0]))
        placed = [("O", 4), ("n", 2), ("e", 3.5)]
        assert told(KEEPS, *turns) == [*placed, (END, 1)]
        assert told(None, *turns) == [*placed, ("</s>", 1)]
        assert told(QWEN3, *turns) == [("<think>\n\n</think>\n\n", 1), *placed, (END, 1)]

    def test_of_the_content_as_the_template_shows_it(self):
        turns = (user("a?"), answer(" On\n", token_weights=[2, 3]))
        assert told(TRIMS, *turns) == [("O", 2), ("n", 3), (END, 1)]
        turns = (user("a?"), answer("<think>hm</think>On", token_weights=[2, 3]))
        assert told(HIDES, *turns) == [("O", 2), ("n", 3), (END, 1)]

    def test_of_what_else_the_turn_has(self):
        turns = (user("a?"), answer("On", token_weights=[2, 3], weight=0.5))
        assert told(KEEPS, *turns) == [("O", 2), ("n", 3), (END, 0.5)]

    def test_of_the_whole_turn(self):
        turns = (user("a?"), answer("On", token_weights=[2, 3, 4], weight=0.5))
        assert told(KEEPS, *turns) == [("O", 2), ("n", 3), (END, 4)]
        assert told(SHOUTS, *turns) == [("O", 2), ("N", 3), (END, 4)]

    def test_of_whole_words_and_of_parts_of_characters(self):
        turns = (user("hello"), answer("hello good 🙂", token_weights=[1, 2, 3, 4, 5, 6, 7]))
        encoded = encode(KEEPS, *turns, tokenizer=WORDS)
        ids = WORDS("hello good 🙂", add_special_tokens=False)["input_ids"]
        assert len(ids) == 7  # hello, good, the space, the four bytes
        assert encoded.example.observed_ids.tolist() == [*ids, WORDS.convert_tokens_to_ids(END)]
        assert encoded.example.token_weights.tolist() == [1, 2, 3, 4, 5, 6, 7, 1]

    @pytest.mark.parametrize("count", [0, 1, 3, 6])
    def test_of_another_count(self, count):
        turns = (user("a?"), answer("One.", token_weights=[1.0] * count))
        assert refused(KEEPS, *turns) == (
            f"messages[1].token_weights has {count} numbers, its turn has 5 tokens, its content 4: "
            "give one for each"
        )

    def test_first_token_of_all_counts_though_it_is_not_supervised(self):
        turns = (user(""), answer("One.", token_weights=[9, 2, 3, 4]))
        assert told(None, *turns) == [("n", 2), ("e", 3), (".", 4), ("</s>", 1)]
        turns = (user(""), answer("One.", token_weights=[9, 2, 3, 4, 5]))
        assert told(None, *turns) == [("n", 2), ("e", 3), (".", 4), ("</s>", 5)]


class TestSupervise:
    TURNS = (user("a?"), answer("One.", spans=[[0, 3, 2]]), user("b?"), answer("Two.", weight=3))

    def test_the_last_turn_only(self):
        assert told(KEEPS, *self.TURNS, supervise="last") == [("Two." + END, 3)]

    def test_spans_of_a_turn_that_is_not_supervised_need_no_place(self):
        turns = (user("a?"), answer("One.", spans=[[0, 3]]), user("b?"), answer("Two."))
        assert "rewrites" in refused(SHOUTS, *turns)
        assert told(SHOUTS, *turns, supervise="last") == [("TWO." + END, 1)]

    def test_every_token(self):
        assert told(KEEPS, *self.TURNS, supervise="all") == [
            ("user\na?" + END + "\n<|im_start|>assistant\n", 1),
            ("One", 2),
            ("\n<|im_start|>user\nb?" + END + "\n<|im_start|>assistant\n", 1),
            ("Two." + END, 3),
            ("\n", 1),
        ]


class TestCut:
    def test_weights_are_cut_with_their_tokens(self):
        turns = (user("a?"), answer("One.", spans=[[1, 2, 2], [3, 4, 5]], weight=0.5))
        found = told(None, *turns, max_length=5, too_long="cut")
        assert found == [("O", 0.5), ("n", 2), ("e", 0.5)]

    def test_lists_are_of_the_tokens_before_the_cut(self):
        turns = (user("a?"), answer("One.", token_weights=[1, 2, 3, 4]))
        found = told(None, *turns, max_length=5, too_long="cut")
        assert found == [("O", 1), ("n", 2), ("e", 3)]
        turns = (user("a?"), answer("One.", token_weights=[1, 2, 3]))
        reason = refused(None, *turns, max_length=5, too_long="cut")
        assert reason.startswith("messages[1].token_weights has 3 numbers")


@pytest.mark.parametrize(
    ("fields", "renderings"), [({}, 2), ({"weight": 2}, 2), ({"spans": [[0, 3]]}, 3)]
)
def test_only_places_in_the_content_cost_another_rendering(monkeypatch, fields, renderings):
    """Of a conversation whose like was rendered before: with marks and without."""
    tokenizer, calls = byte_tokenizer(), []
    render = _Renderer.render
    monkeypatch.setattr(
        _Renderer, "render", lambda *args, **named: calls.append(1) or render(*args, **named)
    )
    found = Encoder(tokenizer, KEEPS, 10_000)
    for content in ("One.", "Two."):
        calls.clear()
        row = {"messages": [user("a?"), answer(content, **fields)]}
        found.encode(parse_row(SimpleNamespace(name="x"), 1, row, "auto"))
    assert len(calls) == renderings


@pytest.mark.parametrize(
    ("content", "text", "shown", "kept"),
    [
        ("One.", "A: One.!", "One.", Kept(0, 4, 3)),
        (" One. ", "A: One.!", "One.", Kept(1, 5, 3)),
        (" One. ", "A: One. !", "One. ", Kept(1, 6, 3)),
        ("One. ", "A: One. !", "One.", Kept(0, 4, 3)),
        ("<t>hm</t>One.", "A: One.!", "One.", Kept(9, 13, 3)),
        ("<t>hm</t>One.", "A:<t>hm</t>One.!", "hm</t>One.", Kept(0, 13, 2)),
        ("One.<e>", "A: One.<e>", "One.", Kept(0, 7, 3)),
        ("One. Two.", "A: One.!", "One.", Kept(0, 4, 3)),
        ("One. One.", "A: One.!", "One.", None),
        ("One. Two.", "A: One.  Two.!", "One.  Two.", None),
        ("a b</t>", "A: !", " ", None),
        (" ", "A:!", "", None),
        ("", "A:!", "", Kept(0, 0, 2)),
    ],
)
def test_what_is_kept_of_a_content(content, text, shown, kept):
    first = 2 if not shown else text.index(shown)
    assert find_kept(content, text, first, first + len(shown)) == kept


def test_content_that_stands_there_twice():
    assert find_kept("aa", "-aaa-", 2, 3) is None
    assert find_kept("aa", "-aa-", 1, 2) == find_kept("aa", "-aa-", 2, 3) == Kept(0, 2, 1)
