"""A demonstration: a conversation with the weights of its assistant turns."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]
Row = dict[str, Any]


class UnusableError(Exception):
    """Raised for a demonstration that cannot be used; the message is the reason."""


class WeightedSpan(NamedTuple):
    """Characters of a content, half-open, and the weight of their tokens."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class TurnWeights:
    """The token weights given with an assistant message: by spans, by a list, or one for all.

    `tokens` holds one weight for each token of the content, or of the whole turn.
    """

    weight: float  # of each token outside the spans, or not in the list
    spans: tuple[WeightedSpan, ...] | None = None  # ascending, without overlaps
    tokens: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation as read from one row of a source."""

    id: str
    messages: Messages  # each with "role" and "content", and other fields that a template may use
    tools: list[Row] | None
    source: str
    line: int  # line (JSON lines) or row (everything else), from 1
    weights: tuple[TurnWeights | None, ...] = ()  # one for each message, empty if none has any
    prompt_length: int = 0  # messages at the beginning whose assistant turns are not supervised
    template_kwargs: Row = field(default_factory=dict)  # passed to the chat template
