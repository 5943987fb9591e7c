"""Tokens that two tokenisations share, against all pairs of their spans and the tokenizers' own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.format.records import Example
from qpipe.stages.build_targets.alignment import common_places, runs_of, written_of
from qpipe.stages.looking.vocabulary import Vocabulary, vocabulary_of
from qpipe.tests.support.tokenizers import smollm

LETTERS = (b"a", b"b", b"ab", b"ba", b" ", b" a", b"\xc3", b"\xa9", b"\xc3\xa9", b"<e>", b"<f>")
ENDS = frozenset({9, 10})
SMALL = Vocabulary([each.decode("latin-1") for each in LETTERS], [*LETTERS], ENDS)
A, B, AB, BA, BLANK, BLANK_A, C3, A9, E_ACUTE, END, OTHER_END = range(11)


def example(*runs: list[int]) -> Example:
    """Supervised runs, each behind a token that is not."""
    ids = [token for run in runs for token in (A, *run)]
    starts = np.cumsum([0, *(len(run) + 1 for run in runs[:-1])])
    positions = [
        start + place
        for start, run in zip(starts, runs, strict=True)
        for place in range(1, len(run) + 1)
    ]
    return Example("x", np.array(ids, np.int32), np.array(positions, np.int32))


def places(ours: Example, theirs: Example) -> list[int] | None:
    return common_places(ours, theirs, (written_of(SMALL), written_of(SMALL)))


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ([A, B, A], [A, BA], [0, -1, -1]),
        ([AB, A, B], [A, B, AB], [-1, -1, -1]),
        ([AB, A], [A, B, A], [-1, 2]),
        ([A, B], [BLANK_A, B], [-1, 1]),  # a blank in front, in the first token
        ([A, B], [BLANK, A, B], [1, 2]),  # and as a token
        ([B, E_ACUTE, A], [B, C3, A9, A], [0, -1, 3]),  # a character in two tokens
        ([B, C3, A9], [B, C3, A9], [0, 1, 2]),
        ([A, END], [A, END], [0, 1]),
        ([A, END], [A, OTHER_END], [0, -1]),
        ([A, END], [A], [0, -1]),
        ([A, END, B], [A, END, B], [0, 1, 2]),  # a special token within the text is part of it
        ([A, END, B], [A, OTHER_END, B], None),
        ([A, END, B], [A, B], None),
        ([A, B], [A, A], None),
        ([A], [99], None),  # a token without a text
    ],
)
def test_worked_examples(ours: list[int], theirs: list[int], wanted: list[int] | None) -> None:
    assert places(example(ours), example(theirs)) == wanted


def test_turns_are_compared_one_by_one() -> None:
    assert places(example([A, B], [AB]), example([A, B], [A, B])) == [0, 1, -1]
    assert places(example([A], [B]), example([A, B])) is None
    assert places(example([A], [B, A]), example([BLANK, A], [B, A])) == [1, 2, 3]


@pytest.fixture(scope="module")
def written(mistral: Any) -> tuple[Any, Any]:
    vocabularies = vocabulary_of(smollm()), vocabulary_of(mistral)
    return written_of(vocabularies[0]), written_of(vocabularies[1])


TEXTS = st.lists(
    st.sampled_from(
        [
            *"the answer is, of. course\n\t12",
            " ",
            "  ",
            " and",
            " fiancé",
            "e\u0301",
            "👩\u200d🚀",
            "漢字",
        ]
    )
    | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=3),
    min_size=1,
    max_size=20,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_of_real_tokenizers_it_finds_all_common_tokens_and_no_other(
    mistral: Any, written: tuple[Any, Any], text: str
) -> None:
    examples, spans = [], []
    for tokenizer in (smollm(), mistral):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        examples.append(example(ids))
    ours, theirs = examples
    runs = [runs_of(each, by_id) for each, by_id in zip(examples, written, strict=True)]
    found = common_places(ours, theirs, written)
    if found is None:  # a tokenizer wrote something else than it was given
        assert runs[0] is None or runs[1] is None or runs[0][0].text != runs[1][0].text
        return
    assert runs[0] is not None
    assert runs[1] is not None
    assert runs[0][0].text == text.encode().strip()
    spans = [_spans(text, each, by_id) for each, by_id in zip(examples, written, strict=True)]
    for ours_at, span in enumerate(spans[0]):
        matches = [place for place, other in enumerate(spans[1]) if other == span]
        assert found[ours_at] == (matches[-1] if matches else -1)


def _spans(text: str, each: Example, written: Any) -> list[tuple[int, int]]:
    """First and last byte of each token, counted back from the end of the text."""
    lengths = [len(written[number]) for number in each.observed_ids]
    ends = np.cumsum(lengths) - sum(lengths)
    return [(int(end) - size, int(end)) for end, size in zip(ends, lengths, strict=True)]


def test_most_texts_are_compared(mistral: Any, written: tuple[Any, Any]) -> None:
    texts = ["naïve café", "e\u0301 and é", "👩\u200d🚀 to 漢字", "tab\tand\n\nlines  ", "a" * 300]
    for text in texts:
        pair = [
            example(each(text, add_special_tokens=False)["input_ids"])
            for each in (smollm(), mistral)
        ]
        assert common_places(*pair, written) is not None, text


def test_offsets_of_the_tokenizers_agree(mistral: Any, written: tuple[Any, Any]) -> None:
    """On text without cut characters, the tokens that end at the same character and begin there."""
    text = Path(__file__).parents[3].joinpath("README.md").read_text()[:3000]
    encoded = [
        each(text, add_special_tokens=False, return_offsets_mapping=True)
        for each in (smollm(), mistral)
    ]
    pair = [example(each["input_ids"]) for each in encoded]
    found = common_places(*pair, written)
    assert found is not None
    ours, theirs = (each["offset_mapping"] for each in encoded)
    wrong = [
        (ours[place], theirs[other])
        for place, other in enumerate(found)
        if other >= 0 and text[slice(*ours[place])].strip() != text[slice(*theirs[other])].strip()
    ]
    assert wrong == []
    assert np.mean(np.array(found) >= 0) > 0.6
