"""Any spans of any content have the weights of their characters."""

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from qpipe.stages.encoding.encoder import Encoded

from .weighed import END, KEEPS, TOKENIZERS, TRIMS, WORDS, answer, encode, user

# --- properties --------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        "hello",
        " good",
        " day",
        "yes",
        " ",
        "  ",
        "\n",
        "\n\n",
        "🙂",
        "é",
        "e\u0301",
        "\u3000",
        "x",
        END,
    ]
)
CONTENTS = st.lists(FRAGMENTS, min_size=1, max_size=8).map("".join).filter(str.strip)
HEAD = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
SHOWN = {KEEPS: str, TRIMS: str.strip}


def disjoint(draw, places, weights):
    """Spans between pairs of these ascending places."""
    few = min(2, len(places))
    edges = sorted(draw(st.sets(st.sampled_from(places), min_size=few, max_size=6)))
    return [[a, b, draw(weights)] for a, b in zip(edges[::2], edges[1::2], strict=False)]


def by_character(content, shown, tokens, spans):
    """The weight of each token of characters [start, end) of the text, None for a bad span.

    By the letter: what each character is worth, then what the characters of a token agree upon.
    """
    owners = {}  # character of the text: the span that it is in
    lead = len(HEAD) - content.index(shown)
    for number, (start, end, _) in enumerate(spans):
        owners |= {place + lead: number for place in range(start, end)}
    owners = {p: n for p, n in owners.items() if len(HEAD) <= p < len(HEAD) + len(shown)}
    text = HEAD + shown + END + "\n"
    found = []
    for start, end in tokens:
        words = [place for place in range(start, end) if text[place].strip()]
        agreed = {owners.get(place) for place in words or range(start, end)}
        if len(agreed) > 1:
            return None
        found += agreed
    if set(range(len(spans))) - set(found):
        return None
    return [0 if number is None else spans[number][2] for number in found]


def spans_of(data, content, shown, tokens, clean):
    places = range(len(content) + 1)
    if clean:  # where a token begins, and none goes across, in the part that is shown
        cut = {place for start, end in tokens for place in range(start + 1, end)}
        edges = {start for start, _ in tokens} - cut
        lead = content.index(shown)
        places = [lead + i for i in range(len(shown) + 1) if len(HEAD) + i in edges]
    assume(places)
    return disjoint(data.draw, list(places), st.sampled_from([0, 0.5, 1, 2, 3]))


@pytest.mark.parametrize("clean", [True, False], ids=["between tokens", "anywhere"])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_spans_of_any_content(name, clean, data):
    template, content = data.draw(st.sampled_from([KEEPS, TRIMS])), data.draw(CONTENTS)
    shown = SHOWN[template](content)
    # The offsets of whole tokens, also for the tokenizer that trims them.
    whole = WORDS if name == "trimmed" else TOKENIZERS[name]
    layout = whole(HEAD + shown + END + "\n", return_offsets_mapping=True, add_special_tokens=False)
    turn = [
        (start, end)
        for start, end in layout["offset_mapping"]
        if end > len(HEAD) and start < len(HEAD) + len(shown) + len(END)
    ]
    spans = spans_of(data, content, shown, turn, clean)
    wanted = by_character(content, shown, turn, spans)

    turns = (user("a?"), answer(content, spans=spans))
    encoded = encode(template, *turns, tokenizer=TOKENIZERS[name])
    event("rejected" if wanted is None else f"{len(spans)} spans")
    if wanted is None or not any(wanted):
        assert wanted is not None or not clean
        assert isinstance(encoded, str)
    else:
        assert isinstance(encoded, Encoded), encoded
        assert encoded.example.input_ids.tolist() == layout["input_ids"]
        assert encoded.example.token_weights.tolist() == [each for each in wanted if each]
