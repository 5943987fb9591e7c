"""A demonstration: a conversation with the weights of its assistant turns."""

from dataclasses import dataclass
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]
Row = dict[str, Any]


class UnusableError(Exception):
    """A demonstration that cannot be used; the message says why."""


class WeightedSpan(NamedTuple):
    """Characters of a content, half-open, and the weight of their tokens."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class TurnWeights:
    """What an assistant's message says of the weights of its tokens: spans, or a list, or neither.

    `tokens` are the weights of the tokens of the content, or of the whole turn, one by one.
    """

    weight: float  # of every token that is in none of the spans, or not in the list
    spans: tuple[WeightedSpan, ...] | None = None  # ascending, none overlaps another
    tokens: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation, as its row in the source gave it."""

    id: str
    messages: Messages  # each with "role" and "content", and what else a template may want
    tools: list[Row] | None
    source: str
    line: int  # line (JSON lines) or row (everything else), from 1
    weights: tuple[TurnWeights | None, ...] = ()  # one for each message, empty if none has any
