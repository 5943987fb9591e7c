"""Ids of two vocabularies that stand for the same text."""

import pytest
from qpipe.stages.looking.vocabulary import Vocabulary, matching_ids, vocabulary_of
from qpipe.tests.support.tokenizers import smollm


def made(*tokens: str, special: tuple[int, ...] = ()) -> Vocabulary:
    """A vocabulary spelt as sentencepiece does; the text of a token follows from its spelling."""
    contents = [
        bytes([int(token[3:5], 16)])
        if token.startswith("<0x")
        else token.replace("▁", " ").encode()
        for token in tokens
    ]
    return Vocabulary(list(tokens), list(contents), frozenset(special))


@pytest.mark.parametrize(
    ("theirs", "ours", "wanted"),
    [
        (made("a", "b", "▁the"), made(" the", "b"), [-1, 1, 0]),
        # a token and a byte of the same text: equal spellings first, then tokens before bytes
        (made("<0x61>", "a"), made("a", "<0x61>"), [1, 0]),
        (made("<0x61>", "a"), made("a"), [-1, 0]),
        (made("<0x61>"), made("a"), [0]),
        (made("▁"), made("<0x20>", " "), [1]),
        # special tokens are not texts
        (made("</s>", special=(0,)), made("</s>"), [-1]),
        (made("</s>", special=(0,)), made("</s>", "</s>", special=(1,)), [1]),
    ],
)
def test_ids_of_the_same_text(theirs: Vocabulary, ours: Vocabulary, wanted: list[int]) -> None:
    assert matching_ids(theirs, ours).tolist() == wanted


def test_a_real_vocabulary_is_its_own_match() -> None:
    vocabulary = vocabulary_of(smollm())
    assert matching_ids(vocabulary, vocabulary).tolist() == list(range(len(smollm())))
