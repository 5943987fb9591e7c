"""Ranges of characters, what two texts have in common, and where a literal may be cut."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]  # characters, half-open
Offsets = NDArray[np.int64]  # [T, 2] the characters of each token


def overlapping(offsets: Offsets, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens share a character with a span, [T]; a token without characters does not."""
    starts, ends = offsets.T
    shares = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        shares |= (starts < end) & (ends > start) & (starts < ends)
    return shares


def difference(text: str, varied: str) -> Span:
    """The character range of `text` outside its common prefix and suffix with `varied`."""
    first = common_prefix(text, varied)
    return first, len(text) - common_suffix(text[first:], varied[first:])


def common_suffix(a: str, b: str) -> int:
    """Length of the common suffix of two texts."""
    return common_prefix(a[::-1], b[::-1])


def common_prefix(a: str, b: str) -> int:
    """Length of the common prefix of two texts, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Syntax:
    """The special tokens of a tokenizer, which a literal is not cut within."""

    special: Sequence[str]
    begin: str | None = None  # the token that begins a text, unless it also ends one

    @cached_property
    def _piece(self) -> re.Pattern[str]:
        special = map(re.escape, sorted(self.special, key=len, reverse=True))
        others = (r"<[^<>\s]*>", r"\[[^\[\]\s]*\]", r"\w+", "(?s:.)")
        return re.compile("|".join([*special, *others]))

    def pieces(self, text: str) -> list[str]:
        """Special tokens, what looks like one, words, and other characters."""
        return self._piece.findall(text)

    def is_token(self, text: str) -> bool:
        """Whether a text ends with a special token, or what looks like one."""
        last = self.pieces(text[-200:])[-1:]
        return any(len(piece) > 1 and not piece[-1].isalnum() for piece in last)

    def cut(self, text: str, length: int) -> int:
        """The length of the whole pieces among the first `length` characters."""
        ends = (found.end() for found in self._piece.finditer(text))
        return max(takewhile(lambda end: end <= length, ends), default=0)

    def cut_end(self, text: str, length: int) -> int:
        """The length of the whole pieces among the last `length` characters."""
        lengths = (len(text) - found.start() for found in self._piece.finditer(text))
        return max((each for each in lengths if each <= length), default=0)
