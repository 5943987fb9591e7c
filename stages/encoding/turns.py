"""Locates the assistant turns in a rendered conversation.

Templates rewrite turns (Qwen3 drops earlier reasoning, Llama 3 trims), so neither a search for the
content nor renderings of ever longer prefixes locate a turn. Instead a turn is rendered once more
with a stand-in for its content, a character that occurs nowhere else: what differs between the two
renderings is the turn. A conversation of one turn is rendered three times in all, one of n turns at
least 3n times; a turn with weights by character or by token once more.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..demonstrations.demonstration import Messages, UnusableError

Render = Callable[..., str]
Span = tuple[int, int]  # characters, half-open
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


@dataclass(frozen=True)
class TemplatedChat:
    """A conversation rendered with a chat template."""

    render: Render
    messages: Messages
    end_of_turn: re.Pattern[str]

    @cached_property
    def text(self) -> str:
        return self.render(self.messages)

    @cached_property
    def stand_in(self) -> str:
        """A character that is not in the text, from the private use area unless all of that is."""
        return next(char for char in map(chr, range(0xE000, 0x110000)) if char not in self.text)

    def places(self, turns: Sequence[int]) -> dict[int, Span]:
        """The character range that the model writes for each of these turns that the text shows."""
        places: dict[int, Span] = {}
        earliest = 0
        for turn in turns:
            span = self._called_span(turn) or self._span(turn, earliest)
            if span:
                places[turn] = span
                earliest = span[1]
        return places

    def kept(self, turn: int) -> Kept | None:
        """The part of a turn's content that the text shows."""
        message = self.messages[turn]
        other = {**message, "content": self.stand_in}
        try:
            varied = self.render([*self.messages[:turn], other, *self.messages[turn + 1 :]])
        except UnusableError:
            return None
        if self.stand_in not in varied:
            return None
        return find_kept(message["content"], self.text, *_difference(self.text, varied))

    def _span(self, turn: int, earliest: int) -> Span | None:
        varied = self.render([*self._until(turn), *self.messages[turn + 1 :]])
        if self.stand_in not in varied:
            return None  # the template omits this turn
        first, last = _difference(self.text, varied)
        start = self._generation_start(turn, earliest, first, last)
        return start, self._generation_end(turn, last, varied)

    def _until(self, turn: int) -> Messages:
        """The conversation up to a turn, with the stand-in as that turn."""
        return [*self.messages[:turn], {"role": "assistant", "content": self.stand_in}]

    def _generation_start(self, turn: int, earliest: int, first: int, last: int) -> int:
        """The end of the generation prompt before a turn; `first` if it cannot be determined.

        What the template itself inserts after it, such as Qwen3's "<think>\\n", counts as part of
        the turn.
        """
        before = self.messages[:turn]
        try:
            prompt = self.render(before, generation_prompt=True)
            is_prefix = len(prompt) <= last and self.text.startswith(prompt)
            if is_prefix and len(prompt) >= first:
                return len(prompt)
            history = self.render(before)
        except UnusableError:
            return first
        if not prompt.startswith(history) or prompt == history:
            return first
        if is_prefix:
            return len(prompt)
        # The history is rewritten, but the message before the turn is not. Searching for the prompt
        # together with as many characters before it excludes a quotation of the prompt.
        words = str(before[-1].get("content", "")).strip()
        mark = prompt[max(0, len(history) - len(words)) :]
        found = self.text.rfind(mark, earliest, first)
        return found + len(mark) if found >= 0 else first

    def _generation_end(self, turn: int, last: int, varied: str) -> int:
        """The end of the text that closes the turn; `last` if nothing does.

        Text that also follows when the conversation stops here is not the header of the next turn.
        """
        is_final = turn == len(self.messages) - 1
        stopped = varied if is_final else self.render(self._until(turn))
        _, _, rest = stopped.rpartition(self.stand_in)
        match = self.end_of_turn.match(rest)
        ends_so = match is not None and self.text.startswith(match.group(), last)
        return last + match.end() if match is not None and ends_so else last

    def _called_span(self, turn: int) -> Span | None:
        """The span of a turn with tool calls, if its prefixes are rendered as in the whole.

        Templates that check the order of calls and results reject a stand-in without calls.
        """
        if not self.messages[turn].get("tool_calls"):
            return None
        try:
            prompt = self.render(self.messages[:turn], generation_prompt=True)
            answered = self.render(self.messages[: turn + 1])
        except UnusableError:
            return None
        if not (self.text.startswith(answered) and answered.startswith(prompt)):
            return None
        return len(prompt), len(answered.rstrip())


@dataclass(frozen=True)
class JoinedChat:
    """The concatenated contents of a conversation, with an `end` token after each answer."""

    messages: Messages
    end: str

    @cached_property
    def parts(self) -> list[str]:
        return [self._part(message["role"], message["content"]) for message in self.messages]

    def _part(self, role: str, content: str) -> str:
        return content + self.end * (role == "assistant" and not content.endswith(self.end))

    @cached_property
    def text(self) -> str:
        return "".join(self.parts)

    @cached_property
    def starts(self) -> list[int]:
        return list(accumulate(map(len, self.parts), initial=0))

    def places(self, turns: Sequence[int]) -> dict[int, Span]:
        """The character range that the model writes for each of these turns."""
        return {turn: (self.starts[turn], self.starts[turn + 1]) for turn in turns}

    def kept(self, turn: int) -> Kept:
        """The place of a turn's content, which is shown in full."""
        return Kept(0, len(self.messages[turn]["content"]), self.starts[turn])


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


def _difference(text: str, varied: str) -> Span:
    """The character range of `text` outside its common prefix and suffix with `varied`."""
    first = _common_prefix(text, varied)
    return first, len(text) - _common_prefix(text[first:][::-1], varied[first:][::-1])


def _common_prefix(a: str, b: str) -> int:
    """Length of the common prefix of two texts, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
