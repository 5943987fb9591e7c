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
from ..demonstrations.demonstration import (
    Demonstration,
    TurnWeights,
    UnusableError,
    WeightedSpan,
)
from .content import Kept
from .spans import Offsets, Span, overlapping
from .turns import JoinedChat, TemplatedChat

Indices = NDArray[np.intp]


class Turn(NamedTuple):
    """An assistant turn and its place in the text."""

    name: str  # as used in error messages
    content: str
    given: TurnWeights
    place: list[Span]  # the characters that the model writes; empty if the template omits the turn
    kept: Kept | None  # None if unknown, or not needed


def turn_of(
    turn: int,
    demonstration: Demonstration,
    layout: TemplatedChat | JoinedChat,
    places: dict[int, list[Span]],
) -> Turn:
    """A turn, by its index in the messages; `places` are those of turns in the text."""
    given = demonstration.weights[turn] or TurnWeights(1.0)
    place = places.get(turn, [])
    needs_content = bool(given.spans) or given.tokens is not None
    kept = layout.kept(turn) if place and needs_content else None
    content = demonstration.messages[turn]["content"]
    return Turn(f"messages[{turn}]", content, given, place, kept)


def weigh(text: str, offsets: Offsets, turns: Sequence[Turn]) -> Floats:
    """The weight of each token, [T]; 1 if none is given.

    Raises UnusableError for a weight that cannot be assigned to tokens of its own.
    """
    weights = np.ones(len(offsets), dtype=np.float32)
    taken = np.zeros(len(offsets), dtype=np.bool_)
    for turn in turns:
        if not turn.place:
            if turn.given.spans or turn.given.tokens:
                key = "spans" if turn.given.spans else "token_weights"
                raise UnusableError(f"the template leaves {turn.name} out, and its {key} with it")
            continue
        tokens = np.flatnonzero(overlapping(offsets, turn.place))
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


def _turn_weights(turn: Turn, tokens: Indices, offsets: Offsets, text: str) -> Floats:
    """The weight of each of a turn's `tokens`."""
    given = turn.given
    if given.spans:
        return _span_weights(turn, given.spans, given.weight, offsets[tokens], text)
    if given.tokens is not None:
        return _listed_weights(turn, given.tokens, given.weight, offsets[tokens])
    return np.full(len(tokens), given.weight, dtype=np.float32)


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
