"""Renders a conversation, parts of it and others like it, with marks about each text.

A template is a program that may refuse any of them: `attempt` then returns None. What is found out
about a template's literals is kept for the conversations of the same kind.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from ..demonstrations.demonstration import Messages, Row, UnusableError
from .marks import Field, Marker, Rendering, around, inside, marker_of, nowhere
from .spans import common_prefix, common_suffix

T = TypeVar("T")
Render = Callable[..., str]

PROBE = "Yes"
ASKED: Row = {"role": "user", "content": PROBE}
ANSWER: Row = {"role": "assistant", "content": PROBE}
MAX_LEARNED = 1 << 14


@dataclass(frozen=True)
class Renderings:
    """The renderings of a conversation and of its parts.

    `learned` is shared by the conversations of a template; `variant` names what else they are
    rendered with.
    """

    render: Render
    messages: Messages
    learned: dict[Hashable, Any]
    variant: str = ""

    @cached_property
    def text(self) -> str:
        return self.render(self.messages)

    @cached_property
    def whole(self) -> Rendering:
        """The conversation with its marks."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[Marker, Rendering]:
        """A marker whose marks change nothing else in the rendering, and what it reads."""
        marker = marker_of(self.text)
        for each in (marker, replace(marker, alike=True)):
            read = self._kept_by(each)
            if read is not None:
                return each, read
        fields = [field for fields in marker.mark(self.messages)[1] for field in fields]
        places = {(each.name, each.text): nowhere for each in fields}
        for each in fields:
            for place in (around, inside):
                tried = places | {(each.name, each.text): place}
                if self._kept_by(replace(marker, places=tried)) is not None:
                    places = tried
                    break
            else:
                self._refuse_shown(each)
        marker = replace(marker, places=places)
        return marker, self._marked(self.messages, marker)

    def _kept_by(self, marker: Marker) -> Rendering | None:
        try:
            read = self._marked(self.messages, marker)
        except UnusableError:
            return None
        return read if read.text == self.text else None

    @property
    def unused(self) -> str:
        """A character that is not in the rendering."""
        return chr(self._read[0].first)

    def _refuse_shown(self, field: Field) -> None:
        if field.text.strip() in self.text:
            raise UnusableError(
                f"the template examines messages[{field.message}].{field.name}: its place in the "
                "rendering is not known"
            )

    def _marked(self, messages: Messages, marker: Marker, prompt: bool = False) -> Rendering:
        marked, fields = marker.mark(messages)
        return marker.read(self.render(marked, prompt), fields)

    def attempt(self, messages: Messages, prompt: bool = False) -> Rendering | None:
        """A rendering of other messages; None if the template refuses them."""
        try:
            return self._marked(messages, self._read[0], prompt) if messages else None
        except UnusableError:
            return None

    def prompted(self, messages: Messages) -> tuple[Rendering, Rendering, str] | None:
        """A rendering without and with the generation prompt, and the prompt."""
        history, prompted = self.attempt(messages), self.attempt(messages, prompt=True)
        if history is None or prompted is None:
            return None
        return history, prompted, prompted.text[common_prefix(prompted.text, history.text) :]

    def learn(self, kind: str, turn: int, literal: str, find: Callable[[], T]) -> T:
        """What `find` returns for a literal at a turn of such a conversation, found once."""
        until = self.messages[: turn + 2]
        shape = tuple(message["role"] + "!" * ("tool_calls" in message) for message in until)
        key = (kind, turn, literal, shape, self.variant)
        if key not in self.learned:
            if len(self.learned) >= MAX_LEARNED:
                self.learned.clear()
            self.learned[key] = find()
        return self.learned[key]

    def stopped(self, turn: int) -> tuple[Rendering, int]:
        """A rendering that stops after a turn, and the turn's index in it."""
        if turn == len(self.messages) - 1:
            return self.whole, turn
        stopped = self.attempt(self.messages[: turn + 1])
        if stopped is not None:
            return stopped, turn
        return self.attempt([ASKED, self.messages[turn]]) or Rendering("", ()), 1

    def same(self, index: int, other: Rendering, author: int) -> int | None:
        """The mark of another rendering that is most like a mark of the whole one."""
        name = self.whole.marks[index].field.name
        before, after = self.whole.before(index), self.whole.after(index)

        def likeness(each: int) -> int:
            ahead = common_suffix(before, other.before(each))
            return ahead + common_prefix(after, other.after(each))

        marks = [i for i in other.of(author) if other.marks[i].field.name == name]
        return max(marks, key=likeness, default=None)
