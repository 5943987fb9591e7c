"""Parses the token weights of a message: one number, spans of characters, or a list of tokens."""

from itertools import pairwise
from reprlib import repr as shown
from typing import Any

from .demonstration import Messages, Row, TurnWeights, UnusableError, WeightedSpan

WEIGHT_KEYS = ("weight", "spans", "token_weights")  # of an assistant's message
MAX_WEIGHT = 1e30  # so that its product with the scale of any method fits into float32


def take_weights(messages: Messages) -> tuple[TurnWeights | None, ...]:
    """Remove the weights from each message, as templates do not know them, and return them."""
    weights = tuple(_turn_weights(f"messages[{i}]", message) for i, message in enumerate(messages))
    return weights if any(weights) else ()


def _turn_weights(name: str, message: Row) -> TurnWeights | None:
    weight, spans, tokens = (message.pop(key, None) for key in WEIGHT_KEYS)
    if message["role"] != "assistant":
        for key, value in (("spans", spans), ("token_weights", tokens)):
            if value not in (None, []):
                raise UnusableError(f"{name}.{key}: only an assistant's message can carry {key}")
        return None
    if spans is not None and tokens is not None:
        raise UnusableError(f"{name} has both spans and token_weights: leave one of them out")
    otherwise = 1.0 if spans is None else 0.0
    given = TurnWeights(
        weight=otherwise if weight is None else _weight(f"{name}.weight", weight),
        spans=None if spans is None else _spans(f"{name}.spans", spans, len(message["content"])),
        tokens=None if tokens is None else _weights(f"{name}.token_weights", tokens),
    )
    return None if given == TurnWeights(1.0) else given  # the default of every token


def _weights(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise UnusableError(f"{name} is {shown(value)}: give a list of numbers, one for a token")
    return tuple(_weight(f"{name}[{i}]", weight) for i, weight in enumerate(value))


def _weight(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= MAX_WEIGHT):  # NaN is not within either
        raise UnusableError(f"{name} is {shown(value)}: give a number from 0 to {MAX_WEIGHT:g}")
    return float(value)


def _spans(name: str, value: Any, length: int) -> tuple[WeightedSpan, ...]:
    if not isinstance(value, list):
        raise UnusableError(f"{name} is {shown(value)}: give a list of [start, end, weight]")
    spans = sorted(_weighted_span(f"{name}[{i}]", span, length) for i, span in enumerate(value))
    for before, span in pairwise(spans):
        if span.start < before.end:
            raise UnusableError(
                f"{name}: [{before.start}, {before.end}] and [{span.start}, {span.end}] overlap: "
                "give each character one weight"
            )
    return tuple(spans)


def _weighted_span(name: str, value: Any, length: int) -> WeightedSpan:
    start, end, weight = _span_parts(name, value)
    if not (_is_index(start) and _is_index(end)):
        wrong = "start and end must be whole numbers"
    elif start < 0:
        wrong = "it starts before the content does"
    elif end > length:
        wrong = f"it ends after the {length} characters of the content"
    elif start >= end:
        wrong = "it holds no character, its end must be above its start"
    else:
        weight = 1.0 if weight is None else _weight(f"{name}.weight", weight)
        return WeightedSpan(int(start), int(end), weight)
    raise UnusableError(f"{name} is {shown(value)}: {wrong}")


def _span_parts(name: str, value: Any) -> tuple[Any, Any, Any]:
    """Start, end and weight of a span as given; each is None if absent."""
    if isinstance(value, list) and len(value) in (2, 3):
        start, end, *weight = value
        return start, end, weight[0] if weight else None
    if isinstance(value, dict) and value.keys() <= {"start", "end", "weight"}:
        return value.get("start"), value.get("end"), value.get("weight")
    raise UnusableError(
        f"{name} is {shown(value)}: give [start, end], [start, end, weight], or these by name"
    )


def _is_index(value: Any) -> bool:
    """Whether a value is a whole number; a column with one float holds all numbers as floats."""
    is_whole = isinstance(value, float) and value.is_integer()
    return is_whole or (isinstance(value, int) and not isinstance(value, bool))
