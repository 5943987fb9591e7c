"""Where the assistant turns lie in a rendered conversation."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from ..demonstrations.demonstration import Demonstration, Messages, TurnWeights, UnusableError
from .token_weights import Kept, Span, Turn, find_kept

if TYPE_CHECKING:
    pass


Render = Callable[..., str]


@dataclass(frozen=True)
class TemplatedChat:
    """A conversation under a template, and where its turns lie in the rendered text."""

    render: Render
    messages: Messages
    end_of_turn: re.Pattern[str]

    @cached_property
    def text(self) -> str:
        return self.render(self.messages)

    @cached_property
    def stand_in(self) -> str:
        """A character that the text does not hold, for private use unless it holds all of those."""
        return next(char for char in map(chr, range(0xE000, 0x110000)) if char not in self.text)

    def places(self, turns: Sequence[int]) -> dict[int, Span]:
        """The characters that the model writes at each of these turns that the text shows."""
        places: dict[int, Span] = {}
        earliest = 0
        for turn in turns:
            span = self._called_span(turn) or self._span(turn, earliest)
            if span:
                places[turn] = span
                earliest = span[1]
        return places

    def kept(self, turn: int) -> Kept | None:
        """What the text shows of the content of a turn; the rest of the turn stays as it is."""
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
            return None  # the template leaves this turn out
        first, last = _difference(self.text, varied)
        start = self._generation_start(turn, earliest, first, last)
        return start, self._generation_end(turn, last, varied)

    def _until(self, turn: int) -> Messages:
        """The conversation until a turn, and the stand-in in its place."""
        return [*self.messages[:turn], {"role": "assistant", "content": self.stand_in}]

    def _generation_start(self, turn: int, earliest: int, first: int, last: int) -> int:
        """The end of the generation prompt before a turn; `first` where none can be made out.

        What the template itself puts between the two, such as Qwen3's "<think>\\n", is the model's
        to write.
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
        # The history is rewritten, but the message before the turn stands there as it is. With as
        # many characters before it as that has, a quotation of the prompt is not taken for it.
        words = str(before[-1].get("content", "")).strip()
        mark = prompt[max(0, len(history) - len(words)) :]
        found = self.text.rfind(mark, earliest, first)
        return found + len(mark) if found >= 0 else first

    def _generation_end(self, turn: int, last: int, varied: str) -> int:
        """`last`, or the end of what closes the turn, where something does.

        What follows also when the conversation stops here is no header of the next turn.
        """
        is_final = turn == len(self.messages) - 1
        stopped = varied if is_final else self.render(self._until(turn))
        _, _, rest = stopped.rpartition(self.stand_in)
        match = self.end_of_turn.match(rest)
        ends_so = match is not None and self.text.startswith(match.group(), last)
        return last + match.end() if match is not None and ends_so else last

    def _called_span(self, turn: int) -> Span | None:
        """The span of a turn that calls tools, where its prefixes are rendered as in the whole.

        Templates that check the order of calls and results refuse a stand-in without calls.
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
    """The contents of a conversation one after another, an `end` token after each answer."""

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
        """The characters that the model writes at each of these turns."""
        return {turn: (self.starts[turn], self.starts[turn + 1]) for turn in turns}

    def kept(self, turn: int) -> Kept:
        """Where the content of a turn lies: all of it."""
        return Kept(0, len(self.messages[turn]["content"]), self.starts[turn])


def turn_of(
    turn: int,
    demonstration: Demonstration,
    layout: TemplatedChat | JoinedChat,
    places: dict[int, Span],
) -> Turn:
    given = demonstration.weights[turn]
    place = places.get(turn)
    kept = layout.kept(turn) if place and _needs_content(given) else None
    content = demonstration.messages[turn]["content"]
    return Turn(f"messages[{turn}]", content, given, place, kept)


def _needs_content(given: TurnWeights | None) -> bool:
    return given is not None and (bool(given.spans) or given.tokens is not None)


def _difference(text: str, varied: str) -> Span:
    """The characters of `text` outside what it begins and ends with like `varied`."""
    first = _common_prefix(text, varied)
    return first, len(text) - _common_prefix(text[first:][::-1], varied[first:][::-1])


def _common_prefix(a: str, b: str) -> int:
    """How many characters two texts have in common at their starts, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
