"""Reads the values of a JSON array one after the other, in memory for one of them."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from .reader import LONGEST_LINE

_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_TOKEN = 16  # characters of "\\uD83D\\uDE00", where a text may be cut
_decode = json.JSONDecoder().raw_decode


def array_values(chunks: Iterable[bytes]) -> Iterator[Any]:
    """Yield the values of an array in UTF-8.

    Raises ValueError for what is not an array, and for a value that is longer than a line may be.
    """
    text = _Text(chunks)
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        yield text.value()
        while text.take(",]") == ",":
            yield text.value()
    if text.peek():
        raise ValueError("there is more text after the end of the array")


class _Text:
    """The text from a place on, of which no more is held than necessary."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._count = "", 0, 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow(1):
                return ""

    def take(self, allowed: str) -> str:
        """The next character, one of these."""
        found = self.peek()
        if not found or found not in allowed:
            raise ValueError(
                f"{found or 'the end'!r} where one of {allowed} should be, after {self._count:,} "
                "values of the array"
            )
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value."""
        self.peek()
        self._count += 1
        while True:
            held, damage = len(self._text) - self._at, "it has no end"
            value, end = None, 0
            try:
                value, end = _decode(self._text, self._at)
                is_cut = len(self._text) - end <= _LONGEST_TOKEN  # as is 1 of 1.5
            except json.JSONDecodeError as error:
                damage = error.msg
                is_cut = len(self._text) - error.pos <= _LONGEST_TOKEN
                is_cut = is_cut or damage.startswith("Unterminated string")
            if is_cut and held <= LONGEST_LINE and self._grow(held):
                continue
            if self._at < end:
                self._at = end
                return value
            if held > LONGEST_LINE:
                damage = (
                    f"longer than {LONGEST_LINE:,} characters: give JSON lines (jq -c '.[]'), "
                    "where it is rejected alone"
                )
            raise ValueError(f"value {self._count:,} of the array: {damage}")

    def _grow(self, size: int) -> bool:
        """Hold at least so many more characters; False at the end."""
        parts, taken = [self._text[self._at :]], 0
        while taken < size and (chunk := next(self._chunks, None)) is not None:
            parts.append(self._decoder.decode(chunk))
            taken += len(parts[-1])
        if taken == 0:
            self._decoder.decode(b"", final=True)
            return False
        self._text, self._at = "".join(parts), 0
        return True
