"""Tokens that two tokenisations of the same supervised text have in common.

The supervised tokens of an example stand in runs, one for each turn. The text of a run is the bytes
of its tokens. Two runs have the same text if it is equal up to the last token that is not special:
models end a turn with special tokens of their own. Blanks at either end do not count, since chat
templates and sentencepiece put a blank in front. Special tokens within a text are part of it.

A token of one run is that of the other if both begin and end at the same byte. What precedes it is
then the same text in both, and so is the token itself.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from ...pipeline.format.records import Example
from ..looking.vocabulary import Vocabulary

MARK = b"\xff"  # around the name of a special token; stands in no UTF-8 text
_Written = Sequence[bytes | None]


class Run(NamedTuple):
    """Consecutive supervised tokens: their text, and each one's place in it and bytes."""

    text: bytes
    tokens: list[tuple[int, bytes]]


def written_of(vocabulary: Vocabulary) -> _Written:
    """The bytes that each id adds to the text of a run."""
    written = list(vocabulary.contents)
    for number in vocabulary.special:
        written[number] = MARK + (written[number] or b"") + MARK
    return written


def runs_of(example: Example, written: _Written) -> list[Run] | None:
    """The runs of an example; None if it has a token without a text."""
    positions = example.positions
    cuts = (np.flatnonzero(np.diff(positions) != 1) + 1).tolist()
    contents = [
        written[number] if number < len(written) else None
        for number in example.observed_ids.tolist()
    ]
    known = [each for each in contents if each is not None]
    if len(known) < len(contents):
        return None
    return [_run(known[start:stop]) for start, stop in pairwise([0, *cuts, len(known)])]


def common_places(
    ours: Example, theirs: Example, written: tuple[_Written, _Written]
) -> list[int] | None:
    """For each supervised token of ours the place of theirs that is the same, or −1.

    None if the two have other supervised texts.
    """
    our_runs, their_runs = runs_of(ours, written[0]), runs_of(theirs, written[1])
    if our_runs is None or their_runs is None:
        return None
    if [run.text for run in our_runs] != [run.text for run in their_runs]:
        return None
    starts = accumulate((len(run.tokens) for run in their_runs), initial=0)
    places: list[int] = []
    for our, their, start in zip(our_runs, their_runs, starts, strict=False):
        place_of = {token: start + place for place, token in enumerate(their.tokens)}
        places += [place_of.get(token, -1) for token in our.tokens]
    return places


def _run(contents: Sequence[bytes]) -> Run:
    starts = accumulate(map(len, contents), initial=0)
    ordinary = [place for place, each in enumerate(contents) if not each.startswith(MARK)]
    text = b"".join(contents[: ordinary[-1] + 1] if ordinary else ())
    blanks = len(text) - len(text.lstrip())
    tokens = [(start - blanks, each) for start, each in zip(starts, contents, strict=False)]
    return Run(text.strip(), tokens)
