"""Locates the assistant turns in a rendered conversation.

The conversation is rendered a second time with marks about each text (`marks`). They divide the
rendering into the texts of the messages and the literals that the template writes between them. A
turn consists of its own texts and the literals among them, so it holds no text of another message.
Its ends lie within literals:

- It begins after the generation prompt, which is the rendering of the messages before the turn.
- It ends where the rendering that stops after the turn differs from the whole one, as there the
  next message begins.

These are learned by rendering a part of the conversation, once for each literal and sequence of
roles, not once for each row. What a template refuses to render is tried in another way.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, takewhile
from typing import NamedTuple

from ..demonstrations.demonstration import Messages, Row, UnusableError
from .content import Kept, find_kept
from .marks import Field, Rendering
from .renderings import ANSWER, ASKED, PROBE, Renderings
from .spans import Span, Syntax, common_prefix, common_suffix, difference

Generated = Callable[[Messages], Sequence[Span]]


class Prompt(NamedTuple):
    """What the template writes where the model begins to write.

    `tail` follows the last text before the turn, None if that is not known. Its first `history`
    characters are also there without the generation prompt, which is `text`.
    """

    tail: str | None
    history: int
    text: str


@dataclass(frozen=True)
class TemplatedChat:
    """A conversation rendered with a chat template.

    `generated` returns the spans of {% generation %} in a template that has it.
    """

    renderings: Renderings
    syntax: Syntax
    generated: Generated | None = None

    @property
    def messages(self) -> Messages:
        return self.renderings.messages

    @property
    def text(self) -> str:
        return self.renderings.text

    @property
    def _whole(self) -> Rendering:
        return self.renderings.whole

    def with_messages(self, messages: Messages) -> "TemplatedChat":
        """Another conversation under the same template."""
        return replace(self, renderings=replace(self.renderings, messages=messages))

    def shown(self, turn: int) -> set[str]:
        """The names of a message's texts that the rendering shows."""
        return {mark.field.name for mark in self._whole.marks if mark.field.message == turn}

    def places(self, turns: Sequence[int]) -> dict[int, list[Span]]:
        """The spans that the model writes for each of these turns that the rendering shows."""
        if self.generated is not None:
            return self._generated_places(turns)
        places = {turn: list(self._spans(turn)) for turn in turns}
        return {turn: spans for turn, spans in places.items() if spans}

    def kept(self, turn: int) -> Kept | None:
        """The part of a turn's content that the rendering shows."""
        message, other = self.messages[turn], self.renderings.unused
        varied_message = {**message, "content": other}
        after = self.messages[turn + 1 :]
        try:
            varied = self.renderings.render([*self.messages[:turn], varied_message, *after])
        except UnusableError:
            return None
        if other not in varied or not isinstance(message["content"], str):
            return None
        return find_kept(message["content"], self.text, *difference(self.text, varied))

    def _generated_places(self, turns: Sequence[int]) -> dict[int, list[Span]]:
        assert self.generated is not None
        places: dict[int, list[Span]] = {}
        for start, end in self.generated(self.messages):
            authors = [mark.field.author for mark in self._whole.marks if start < mark.at <= end]
            turn = next((author for author in authors if author in turns), None)
            if turn is not None:
                places.setdefault(turn, []).append(self._checked(turn, start, end))
        return places

    def _checked(self, turn: int, start: int, end: int) -> Span:
        """A span of a turn, which must not hold the text of another message."""
        for mark in self._whole.marks:
            if start < mark.at < end and mark.field.message != turn:
                raise UnusableError(
                    f"what the template writes for messages[{turn}] holds "
                    f"messages[{mark.field.message}].{mark.field.name}"
                )
        return start, end

    # --- the marks of a turn

    def _spans(self, turn: int) -> Iterator[Span]:
        earliest = 0
        for number, (first, last) in enumerate(self._runs(turn)):
            start = self._restart(turn, first) if number else self._start(turn, first)
            start = max(start, earliest)
            earliest = max(start, self._end(turn, last))
            if start < earliest:
                yield self._checked(turn, start, earliest)

    def _runs(self, turn: int) -> list[Span]:
        """First and last mark of each stretch of a turn; texts of others stand between them.

        A template may repeat a text outside its turn, such as the name of a call with its result.
        Only what the rendering that stops after the turn shows belongs to it.
        """
        own = self._whole.of(turn)
        runs = _consecutive(own)
        counts = Counter(self._whole.marks[each].field.name for each in own)
        if len(runs) <= 1 and max(counts.values(), default=0) <= 2:
            return runs
        stopped, author = self.renderings.stopped(turn)
        left = Counter(stopped.marks[each].field.name for each in stopped.of(author))
        if not left and own:
            raise UnusableError(f"the template does not render what ends with messages[{turn}]")
        kept: list[int] = []
        for each in own:
            name = self._whole.marks[each].field.name
            left[name] -= 1
            if left[name] >= 0:
                kept.append(each)
        return _consecutive(kept)

    # --- where a turn begins

    def _start(self, turn: int, first: int) -> int:
        begin, gap = self._whole.start(first), self._whole.before(first)
        prompt = self.renderings.learn("prompt", turn, gap, lambda: self._prompt(turn, first))
        # An answer may begin as the end of the prompt does: "<think>".
        reach = len(gap) if len(gap) <= prompt.history else len(prompt.tail or "")
        if prompt.tail is not None and self.text.startswith(prompt.tail, begin, begin + reach):
            return begin + len(prompt.tail)
        if prompt.text and prompt.text in gap:
            return begin + gap.index(prompt.text) + len(prompt.text)
        shared = self.syntax.cut(gap, common_prefix(gap, prompt.tail or ""))
        if prompt.tail is not None and (shared > prompt.history or not prompt.text):
            return begin + shared
        if prompt.tail is None and (shared := _end_of_part(gap, self.syntax.pieces(prompt.text))):
            return begin + shared
        head = self.renderings.learn("head", turn, gap, lambda: self._head(turn))
        return self._whole.marks[first].at - self.syntax.cut_end(gap, common_suffix(gap, head))

    def _prompt(self, turn: int, first: int) -> Prompt:
        before = self._whole.marks[first - 1].field if first else None
        found = self.renderings.prompted(self.messages[:turn])
        if found is None:
            found, before = self.renderings.prompted([ASKED]), _NEVER
            if found is None:
                return Prompt(None, 0, "")
        history, prompted, text = found
        if not text:
            return self._always(turn, history, before) or self._header(turn, history, before)
        tail = prompted.tail_after(before)
        return Prompt(tail, common_prefix(tail or "", history.tail_after(before) or ""), text)

    def _always(self, turn: int, history: Rendering, before: Field | None) -> Prompt | None:
        """The prompt of a template that ends everything with it: no message goes on with it."""
        asked = self.renderings.attempt([*self.messages[:turn], ASKED])
        own = [] if asked is None else asked.of(turn)
        tail = history.tail_after(before)
        if asked is None or not own or not tail or asked.before(own[0]).startswith(tail):
            return None
        shared = self.syntax.cut(tail, common_prefix(tail, asked.before(own[0])))
        return Prompt(tail, shared, tail[shared:])

    def _header(self, turn: int, history: Rendering, before: Field | None) -> Prompt:
        """The literal before a plain answer, of a template without a generation prompt."""
        answered = self.renderings.attempt([*self.messages[:turn], ANSWER])
        own = [] if answered is None else answered.of(turn)
        if answered is None or not own:
            return Prompt(None, 0, "")
        is_same = (answered.marks[own[0] - 1].field if own[0] else None) == before
        tail = answered.before(own[0]) if is_same else None
        return Prompt(tail, len(history.tail_after(before) or ""), "")

    def _head(self, turn: int) -> str:
        """What the template writes between prompt and first text, if a question is before it."""
        message = self.messages[turn]
        if self.messages[:turn] == [ASKED]:
            return ""
        other = self.with_messages([ASKED, message])
        try:
            own = other._whole.of(1)
            start = other._start(1, own[0]) if own else 0
        except UnusableError:
            return ""
        return other.text[start : other._whole.marks[own[0]].at] if own else ""

    def _restart(self, turn: int, first: int) -> int:
        """Where a turn goes on after texts of others: with the literal of the turn by itself."""
        stopped, author = self.renderings.stopped(turn)
        same = self.renderings.same(first, stopped, author)
        gap, literal = self._whole.before(first), "" if same is None else stopped.before(same)
        return self._whole.marks[first].at - self.syntax.cut_end(gap, common_suffix(gap, literal))

    # --- where it ends

    def _end(self, turn: int, last: int) -> int:
        mark, after = self._whole.marks[last], self._whole.after(last)
        kept = common_prefix(after, mark.field.text[len(mark.field.text.rstrip()) :])
        length = self.renderings.learn("end", turn, after, lambda: self._closing(turn, last, kept))
        return mark.at + max(kept, len(after[:length].rstrip()))

    def _closing(self, turn: int, last: int, kept: int) -> int:
        """The length of the literal after a turn's last text up to where the next message begins.

        Its first `kept` characters are white space of the text itself.
        """
        after = self._whole.after(last)
        if kept == len(after):
            return kept
        is_final = turn == len(self.messages) - 1
        if is_final:
            other = self.renderings.attempt([*self.messages, *_replies(self.messages[turn])])
            length = self._common(last, other, turn)
        else:
            length = self._common(last, *self.renderings.stopped(turn))
        if length <= kept:
            length = len(self._unprompted(turn, last)) if is_final else self._unlike(turn, last)
        if self.messages[turn].get("tool_calls"):
            length = max(kept, self._without_result(turn, last, length))
        return length

    def _common(self, last: int, other: Rendering | None, author: int) -> int:
        """The length of the literal that another rendering has after the same text."""
        same = None if other is None else self.renderings.same(last, other, author)
        if other is None or same is None:
            return 0
        after, theirs = self._whole.after(last), other.after(same)
        length = self._ended(after, self.syntax.cut(after, common_prefix(after, theirs)))
        # What differs is another message, unless it differs within the turn.
        is_whole = length in (len(after), len(theirs))
        return length if is_whole or self.syntax.is_token(after[:length].rstrip()) else 0

    def _ended(self, after: str, length: int) -> int:
        """The length of a literal up to a token that begins texts or messages."""
        begins = (self.syntax.begin, self._opening)
        found = [after.find(each, 0, length) for each in begins if each]
        return min((at for at in found if at >= 0), default=length)

    @cached_property
    def _opening(self) -> str | None:
        """The token that opens the rendering, and thus messages."""
        literal = self._whole.before(0)[:400] if self._whole.marks else ""
        tokens = takewhile(self.syntax.is_token, self.syntax.pieces(literal.lstrip()))
        return next((each for each in tokens if each != self.syntax.begin), None)

    def _without_result(self, turn: int, last: int, length: int) -> int:
        """The length of the end of a call without what begins a result.

        A template may write that after each call. It is what stands before every result, as far as
        it does not end answers too.
        """
        after = self._whole.after(last)
        other = self.renderings.attempt(
            [*self.messages[: turn + 1], *_results(self.messages[turn], 2)]
        )
        same = None if other is None else self.renderings.same(last, other, turn)
        one, two = ([], []) if other is None else (other.of(turn + 1), other.of(turn + 2))
        if other is None or same is None or not one or not two or one[0] < same:
            return length
        literal = other.between(same, one[0])
        header = self.syntax.cut_end(
            literal, common_suffix(literal, other.between(one[-1], two[0]))
        )
        answered = self.renderings.attempt([ASKED, ANSWER])
        ends = self.syntax.pieces(answered.after(len(answered.marks) - 1)) if answered else []
        for piece in reversed(self.syntax.pieces(after[:length])):
            if length <= len(literal) - header or piece in ends:
                break
            length -= len(piece)
        return length

    def _unprompted(self, turn: int, last: int) -> str:
        """The text after the last turn without a generation prompt that the template appends."""
        first = self._runs(turn)[0][0]
        prompt = self._prompt(turn, first).text
        after = self._whole.after(last)
        after = after.removesuffix(prompt) if prompt else after
        return after[: self._ended(after, len(after))]

    def _unlike(self, turn: int, last: int) -> int:
        """The end of a turn that has another end when it is last, or none.

        It precedes both the next message and one of another role, and begins no answer.
        """
        after, role = self._whole.after(last), self.messages[turn + 1]["role"]
        until, found = self.messages[: turn + 1], self.renderings.prompted([ASKED])
        prompt = self.syntax.pieces(found[2]) if found else []
        others = [
            self.renderings.attempt([*until, {"role": other, "content": PROBE}])
            for other in ("user", "system", "tool")
            if other != role
        ]
        lengths = [self._common(last, other, turn) for other in others if other is not None]
        length = min(lengths, default=0)
        begin = after.find(prompt[0]) if prompt else -1
        length = begin if 0 <= begin < length else length
        if length or role != "user":
            return length
        opening = found[0].before(0) if found and found[0].marks else after
        known = {*prompt, *self.syntax.pieces(opening)}
        for piece in self.syntax.pieces(after):
            if piece in known or len(piece) == 1 or piece.isalnum():
                break
            length += len(piece)
        return length


_NEVER = Field(-1, "", "")  # equals no field of a rendering


def _replies(message: Row) -> Messages:
    """What may follow a message: the results of its calls, or a question."""
    count = len(message.get("tool_calls") or [])
    return _results(message, count) if count else [ASKED]


def _results(message: Row, count: int) -> Messages:
    ids = [call.get("id") for call in message["tool_calls"] if isinstance(call, dict)] or [None]
    return [
        {"role": "tool", "content": PROBE, "tool_call_id": ids[i % len(ids)], "name": "probe"}
        for i in range(count)
    ]


def _consecutive(numbers: Sequence[int]) -> list[Span]:
    """First and last of each run of consecutive numbers."""
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [(run[0], run[-1]) for run in runs]


def _end_of_part(gap: str, pieces: Sequence[str]) -> int:
    """Where the longest beginning of the prompt, in whole pieces, ends in a literal; 0 if none."""
    for count in range(len(pieces), 0, -1):
        part = "".join(pieces[:count])
        if part.strip() and part in gap:
            return gap.rindex(part) + len(part)
    return 0


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

    def places(self, turns: Sequence[int]) -> dict[int, list[Span]]:
        """The characters that the model writes for each of these turns."""
        return {
            turn: [(self.starts[turn], self.starts[turn + 1])]
            for turn in turns
            if self.messages[turn]["content"].strip()
        }

    def kept(self, turn: int) -> Kept:
        """The place of a turn's content, which is shown in full."""
        return Kept(0, len(self.messages[turn]["content"]), self.starts[turn])
