"""Marks the texts of messages with characters that occur nowhere else, to find them in a rendering.

The texts of a message are its content, its reasoning, the names and arguments of its calls. A mark
stands before and after each. A rendering of marked messages, without its marks, must equal the
rendering of the messages as they are: then the marks are the places of the texts in it.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from functools import cached_property
from typing import Any, NamedTuple

from ..demonstrations.demonstration import Messages, Row, UnusableError

# Scripts whose letters are printable, without case and rare: Tangut, Han extension B, hieroglyphs,
# cuneiform. The first that a conversation does not use supplies the marks.
_SCRIPTS = ((0x17000, 0x187F7), (0x20000, 0x2A6DF), (0x13000, 0x1342E), (0x12000, 0x12399))
_COMPARED = frozenset(("role", "name", "tool_call_id"))  # templates compare these, as id and type
_OF_OTHERS = "tool_responses"  # a field of an assistant's message that the assistant did not write
# Templates cut a text at the tags of reasoning: the parts about them are marked by themselves.
_THINK_TAG = re.compile(r"(<[^<>\s]*think[^<>\s]*>|\[/?THINK\])", re.IGNORECASE)
_TAG_OR_WORD = re.compile(r"<[^<>\s]*>|([^\W_]+)")


class Field(NamedTuple):
    """A text of a message, such as "content" or "tool_calls[0].function.name"."""

    message: int
    name: str
    text: str

    @property
    def author(self) -> int:
        """The message whose author wrote it; -1 for another's text within a message."""
        return -1 if self.name.startswith(_OF_OTHERS) else self.message

    @property
    def call(self) -> int | None:
        """The index of the call that it is a part of."""
        found = re.match(r"tool_calls\[(\d+)\]", self.name)
        return int(found[1]) if found else None


class Mark(NamedTuple):
    """A place of a field in a rendering."""

    at: int
    field: Field


@dataclass(frozen=True)
class Rendering:
    """A rendering without its marks, and the marks in order."""

    text: str
    marks: Sequence[Mark]

    def before(self, index: int) -> str:
        """The text between a mark and the mark before it, or the beginning."""
        return self.text[self.start(index) : self.marks[index].at]

    def after(self, index: int) -> str:
        """The text between a mark and the next, or the end."""
        return self.text[self.marks[index].at : self.stop(index)]

    def between(self, one: int, other: int) -> str:
        """The text between two marks."""
        return self.text[self.marks[one].at : self.marks[other].at]

    def of(self, author: int) -> list[int]:
        """The indices of the marks in an author's texts."""
        return [i for i, mark in enumerate(self.marks) if mark.field.author == author]

    def tail_after(self, field: Field | None) -> str | None:
        """The text after the last mark; None if that is a mark of another field."""
        last = self.marks[-1].field if self.marks else None
        return self.text[self.marks[-1].at if self.marks else 0 :] if last == field else None

    def start(self, index: int) -> int:
        return self.marks[index - 1].at if index > 0 else 0

    def stop(self, index: int) -> int:
        return self.marks[index + 1].at if index + 1 < len(self.marks) else len(self.text)


Place = Callable[[str, str], str]  # puts a mark into a text


@dataclass(frozen=True)
class Marker:
    """Marks texts with the letters of one script, and reads the marks of a rendering.

    `places` has the fields, by name and text, that are not marked in front and behind. Fields of
    the same text have the same mark if `alike`, for a template that compares messages.
    """

    first: int
    last: int
    places: Mapping[tuple[str, str], Place] = default(default_factory=dict)
    alike: bool = False

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{chr(self.first)}-{chr(self.last)}]")

    def mark(self, messages: Messages) -> tuple[Messages, list[list[Field]]]:
        """The messages with marks, and the fields of each mark in order of the script."""
        fields: list[list[Field]] = []
        letters: dict[Any, int] = {}

        def put(message: int, name: str, text: str) -> str:
            if not text.strip():
                return text
            letter = letters.setdefault((name, text, not self.alike and message), len(fields))
            if letter == len(fields):
                fields.append([])
            if self.first + letter > self.last:
                raise UnusableError(f"more than {letter:,} texts in one row")
            fields[letter].append(Field(message, name, text))
            return self.places.get((name, text), around)(text, chr(self.first + letter))

        return [_mapped(message, i, put) for i, message in enumerate(messages)], fields

    def read(self, text: str, fields: Sequence[Sequence[Field]]) -> Rendering:
        """The rendering with marks, read. Marks that are alike belong to their fields in order."""
        found = list(self._pattern.finditer(text))
        counts, seen = Counter(each[0] for each in found), Counter[str]()
        marks: list[Mark] = []
        for place, each in enumerate(found):
            owners = fields[ord(each[0]) - self.first]
            share, rest = divmod(counts[each[0]], len(owners))
            if rest:
                raise UnusableError("the template does not show messages of the same text alike")
            marks.append(Mark(each.start() - place, owners[seen[each[0]] // share]))
            seen[each[0]] += 1
        return Rendering(self._pattern.sub("", text) if marks else text, marks)


def marker_of(text: str) -> Marker:
    """A marker whose letters the text does not contain."""
    for first, last in _SCRIPTS:
        marker = Marker(first, last)
        if not marker._pattern.search(text):
            return marker
    raise UnusableError("the text uses every script that could mark it, hieroglyphs included")


def _mapped(message: Row, index: int, put: Callable[[int, str, str], str]) -> Row:
    def leaves(value: Any, name: str, skipped: Sequence[str]) -> Any:
        if isinstance(value, str):
            return put(index, name, value)
        if isinstance(value, list):
            return [leaves(item, f"{name}[{i}]", skipped) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        return {
            key: item
            if key in skipped
            else leaves(item, f"{name}.{key}", () if key == "arguments" else skipped)
            for key, item in value.items()
        }

    return {
        key: value if key in _COMPARED else leaves(value, key, ("id", "type"))
        for key, value in message.items()
    }


def around(text: str, mark: str) -> str:
    """Mark a text in front and behind, within white space and the tags of reasoning."""
    parts = _THINK_TAG.split(text)
    return "".join(part if i % 2 else _about(part, mark) for i, part in enumerate(parts))


def _about(text: str, mark: str) -> str:
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{mark}{core}{mark}{text[start + len(core) :]}"


def inside(text: str, mark: str) -> str:
    """Mark the longest word outside tags, for a template that examines how a text begins."""
    words = [found for found in _TAG_OR_WORD.finditer(text) if found[1]]
    word = max(words, key=lambda found: len(found[0]), default=None)
    if word is None:
        return text
    middle = (word.start() + word.end() + 1) // 2
    return text[:middle] + mark + text[middle:]


def nowhere(text: str, mark: str) -> str:
    """Leave a text without a mark, for a template that examines all of it."""
    return text
