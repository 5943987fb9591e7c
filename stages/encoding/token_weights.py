"""Maps the weights of turns and of character spans to tokens, exactly or not at all.

A token belongs to the span that holds its characters. White space does not count, since tokenizers
attach it to neighbouring words, unless the token is white space only. T tokens in a demonstration.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...pipeline.format.records import Floats
from ..demonstrations.demonstration import TurnWeights, UnusableError, WeightedSpan

Span = tuple[int, int]  # characters, half-open
Indices = NDArray[np.intp]
Offsets = NDArray[np.int64]  # [T, 2] the characters of each token


class Kept(NamedTuple):
    """The part of a content that the text shows: characters `start` to `end`, at `at` in it."""

    start: int
    end: int
    at: int

    @property
    def shift(self) -> int:
        """Offset from a place in the content to the same place in the text."""
        return self.at - self.start


class Turn(NamedTuple):
    """An assistant turn and its place in the text."""

    name: str  # as used in error messages
    content: str
    given: TurnWeights | None
    place: Span | None  # the characters that the model writes; None if the template omits the turn
    kept: Kept | None  # None if unknown, or not needed


def weigh(text: str, offsets: Offsets, turns: Sequence[Turn]) -> Floats:
    """The weight of each token, [T]; 1 if none is given.

    Raises UnusableError for a weight that cannot be assigned to tokens of its own.
    """
    weights = np.ones(len(offsets), dtype=np.float32)
    taken = np.zeros(len(offsets), dtype=np.bool_)
    for turn in turns:
        if turn.place is None:
            _check_nothing_lost(turn)
            continue
        tokens = np.flatnonzero(overlapping(offsets, [turn.place]))
        values = _turn_weights(turn, tokens, offsets, text)
        shared = taken[tokens] & (weights[tokens] != values)
        if shared.any():
            start, end = offsets[tokens[shared][0]]
            raise UnusableError(
                f"the token {text[start:end]!r} belongs to {turn.name} and to a turn before it, "
                "whose weights differ: give both the same"
            )
        weights[tokens] = values
        taken[tokens] = True
    return weights


def overlapping(offsets: Offsets, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens share a character with a span, [T]; a token without characters does not."""
    starts, ends = offsets.T
    shares = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        shares |= (starts < end) & (ends > start) & (starts < ends)
    return shares


def find_kept(content: str, text: str, first: int, last: int) -> Kept | None:
    """The part of `content` that the text shows; None if that is not certain.

    `first` to `last` are the characters that change with the content. Templates trim a content or
    drop a part of it. What they drop and write again, such as the "<think>" of an answer, is still
    part of the content.
    """
    if not content:
        return Kept(0, 0, first)
    return _whole(content, text, first, last) or _part(content, text, first, last)


def _whole(content: str, text: str, first: int, last: int) -> Kept | None:
    """The content, except for white space around it, if it occurs once near the difference."""
    core = content.strip()
    shown = text[first:last]
    first_word = first + len(shown) - len(shown.lstrip())
    last_word = first + len(shown.rstrip())
    low, high = max(0, last_word - len(core)), first_word + len(core)
    at = text.find(core, low, high)
    if not core or at < 0 or text.find(core, at + 1, high) >= 0:
        return None
    start = content.find(core)
    end, shift = start + len(core), at - start
    # White space around it that changes with the content belongs to the content.
    while start > 0 and first < start + shift and content[start - 1] == text[start + shift - 1]:
        start -= 1
    while end < len(content) and end + shift < last and content[end] == text[end + shift]:
        end += 1
    return Kept(start, end, start + shift)


def _part(content: str, text: str, first: int, last: int) -> Kept | None:
    """A part of the content, if it occurs in the content once."""
    shown = text[first:last]
    start = content.find(shown)
    if not shown.strip() or start < 0 or content.find(shown, start + 1) >= 0:
        return None
    return Kept(start, start + len(shown), first)


def _check_nothing_lost(turn: Turn) -> None:
    """Raise UnusableError for token weights of a turn that the template omits."""
    if turn.given is not None and (turn.given.spans or turn.given.tokens):
        key = "spans" if turn.given.spans else "token_weights"
        raise UnusableError(f"the template leaves {turn.name} out, and its {key} with it")


def _turn_weights(turn: Turn, tokens: Indices, offsets: Offsets, text: str) -> Floats:
    """The weight of each of a turn's `tokens`."""
    given = turn.given
    if given is not None and given.spans:
        return _span_weights(turn, given.spans, given.weight, offsets[tokens], text)
    if given is not None and given.tokens is not None:
        return _listed_weights(turn, given.tokens, given.weight, offsets[tokens])
    return np.full(len(tokens), 1.0 if given is None else given.weight, dtype=np.float32)


def _listed_weights(
    turn: Turn, listed: Sequence[float], otherwise: float, offsets: Offsets
) -> Floats:
    """Weights given as a list: for the tokens of the content, or of the turn."""
    weights = np.full(len(offsets), otherwise, dtype=np.float32)
    counts = f"its turn has {len(offsets)} tokens"
    if len(listed) == len(offsets):
        weights[:] = listed
        return weights
    if turn.kept is None:
        counts += ", how many of them its content has is not known, since the template rewrites it"
    else:
        start, end = turn.kept.at, turn.kept.at + turn.kept.end - turn.kept.start
        in_content = overlapping(offsets, [(start, end)] if start < end else [])
        if len(listed) == np.count_nonzero(in_content):
            weights[in_content] = listed
            return weights
        counts += f", its content {np.count_nonzero(in_content)}"
    raise UnusableError(
        f"{turn.name}.token_weights has {len(listed)} numbers, {counts}: give one for each"
    )


def _span_weights(
    turn: Turn, spans: Sequence[WeightedSpan], otherwise: float, offsets: Offsets, text: str
) -> Floats:
    """Weights given by character spans of the content."""
    if turn.kept is None:
        raise UnusableError(
            f"the template rewrites {turn.name}.content, so the place of its spans is not known: "
            "leave them out, or write the content as the template does"
        )
    shown = [_shown_part(turn, turn.kept, span) for span in spans]
    shift = turn.kept.shift
    weights = np.full(len(offsets), otherwise, dtype=np.float32)
    without_token = dict(enumerate(spans))
    for i, (start, end) in enumerate(offsets.tolist()):
        characters = [place - shift for place in range(start, end) if not text[place].isspace()]
        characters = characters or range(start - shift, end - shift)
        index, held = _first_holder(shown, characters)
        if held and held < len(characters):
            raise UnusableError(
                f"span {_words(spans[index])} of {turn.name} cuts the token {text[start:end]!r}, "
                f"characters {start - shift}-{end - shift}: take in all of it, or nothing"
            )
        if held:
            weights[i] = spans[index].weight
            without_token.pop(index, None)
    for span in without_token.values():
        raise UnusableError(
            f"span {_words(span)} of {turn.name} holds no token of what the model writes: "
            "let it hold one, or leave it out"
        )
    return weights


def _shown_part(turn: Turn, kept: Kept, span: WeightedSpan) -> Span:
    """A span without white space that the template drops; dropping anything else is an error."""
    start, end = max(span.start, kept.start), min(span.end, kept.end)
    before, after = (span.start, min(span.end, start)), (max(span.start, end), span.end)
    for low, high in (before, after):
        if turn.content[low:high].strip() or (start >= end and low < high):
            raise UnusableError(
                f"the template drops characters {low}-{high} of {turn.name}.content, which span "
                f"{_words(span)} covers: leave them out of it"
            )
    return start, end


def _first_holder(spans: Sequence[Span], characters: Sequence[int]) -> tuple[int, int]:
    """Index of the first span holding any of these ascending characters, and their number.

    (-1, 0) if there is none.
    """
    for index in range(bisect_right(spans, characters[0], key=lambda span: span[1]), len(spans)):
        start, end = spans[index]
        if start > characters[-1]:
            break
        held = sum(start <= place < end for place in characters)
        if held:
            return index, held
    return -1, 0


def _words(span: WeightedSpan) -> str:
    return f"[{span.start}, {span.end}]"
