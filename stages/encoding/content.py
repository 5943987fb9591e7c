"""Finds the part of a content that a rendering shows.

A template keeps a content, trims it, drops a part of it, or rewrites it. The content is rendered
once more as another text: what differs between the two renderings is where it stands.
"""

from typing import NamedTuple


class Kept(NamedTuple):
    """The part of a content that the text shows: characters `start` to `end`, at `at` in it."""

    start: int
    end: int
    at: int

    @property
    def shift(self) -> int:
        """Offset from a place in the content to the same place in the text."""
        return self.at - self.start


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
