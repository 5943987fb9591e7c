"""From a demonstration to an Example: the chat template, the tokens, and which of them count.

A conversation is rendered and tokenised as a whole. A token is supervised when its characters
overlap those that the model would write: an assistant turn, from the end of the generation prompt
to the token that ends the turn, both as they stand in the rendering of the whole conversation.

Templates rewrite turns (Qwen3 drops earlier reasoning, Llama 3 trims), so neither a search for the
content nor the renderings of ever longer prefixes say where a turn lies. Instead a turn is rendered
once more with a stand-in for its content, a character that occurs nowhere else: what differs
between the two renderings is the turn. A single-turn conversation is rendered three times in all,
one of n turns at least 3n times; a turn that has weights by character or by token once more.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import UserError, one_line, reason
from ..pipeline.format.records import Example, Floats, Reject
from .demonstrations.demonstration import Demonstration, Messages, TurnWeights, UnusableError
from .token_weights import Kept, Span, Turn, find_kept, overlapping, weigh

CLOCK = "strftime_now"  # the function that templates ask for the time

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A demonstration as tokens; `cut` when it was longer than the limit and lost its end."""

    example: Example
    cut: bool
    token_weights: Floats  # [N] one for each supervised position: 1 where nothing was given


@dataclass(frozen=True)
class Encoder:
    """Tokenises demonstrations and marks the supervised tokens.

    `template` is the text of a chat template, or None: then the contents follow one another as they
    are, each assistant turn closed by the end-of-sequence token, and the tokenizer adds its own
    special tokens. `supervise` is "assistant" (every assistant turn), "last" (the last of them) or
    "all" (every token but the first). What is longer than `max_length` tokens is rejected or cut.

    Raises UserError for a tokenizer that cannot do this.
    """

    tokenizer: "PreTrainedTokenizerFast"
    template: str | None
    max_length: int
    supervise: str = "assistant"
    too_long: str = "reject"
    vocab_size: int | None = None  # the model's, where that may be smaller than the tokenizer's
    day: date | None = None  # that a template which asks for the time is told; None is now

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise UserError(
                f"tokenizer {_name(self.tokenizer)} gives no character offsets: "
                "use a model with a fast tokenizer (tokenizer.json)"
            )
        if self.template is None:
            _check_end_token(self.tokenizer)

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The tokenizer's special tokens that it writes by name; those of `tokenizer.json` apart.

        They stand in another file, so the tokenizer's hash does not tell them.
        """
        written = "eos_token" if self.template is None else self.template
        named = self.tokenizer.special_tokens_map
        return {name: named[name] for name in sorted(named) if name in written}

    def encode(self, demonstration: Demonstration) -> Encoded | Reject:
        """The tokens of a demonstration, or why it cannot be used."""
        try:
            return self._encode(demonstration)
        except UnusableError as error:
            return Reject(demonstration.source, demonstration.line, reason(error))

    def _encode(self, demonstration: Demonstration) -> Encoded:
        layout = self._lay_out(demonstration)
        input_ids, offsets = self._tokenise(layout.text)
        cut = len(input_ids) > self.max_length
        if cut and self.too_long == "reject":
            raise UnusableError(f"{len(input_ids)} tokens, --max-length is {self.max_length}")
        if self.vocab_size is not None and input_ids.max(initial=0) >= self.vocab_size:
            raise UnusableError(f"a token is outside the model's vocabulary of {self.vocab_size}")

        # Finding the turns takes time that grows with their square: not for what is too long.
        turns = self._turns(demonstration)
        places = layout.places(turns)
        supervised = overlapping(offsets, list(places.values()))
        if self.supervise == "all":
            supervised[:] = True
        supervised[:1] = False  # nothing comes before the first token to predict it from
        positions = np.flatnonzero(supervised[: self.max_length]).astype(np.int32)
        if not len(positions):
            where = f" among the first {self.max_length}" if cut else ""
            raise UnusableError(f"no supervised token{where}")
        example = Example(demonstration.id, input_ids[: self.max_length], positions)
        if not demonstration.weights:
            return Encoded(example, cut, np.ones(len(positions), dtype=np.float32))
        weighed = [_turn(turn, demonstration, layout, places) for turn in turns]
        return Encoded(example, cut, weigh(layout.text, offsets, weighed)[positions])

    def _lay_out(self, demonstration: Demonstration) -> "_Chat | _Joined":
        if self.template is None:
            return _Joined(demonstration.messages, str(self.tokenizer.eos_token))
        renderer = self._renderer(demonstration.tools)
        return _Chat(renderer, demonstration.messages, self._end_of_turn)

    def _turns(self, demonstration: Demonstration) -> list[int]:
        """The turns that must be found: the supervised ones, where not all is, and the weighted."""
        if self.supervise == "all" and not demonstration.weights:
            return []
        roles = [message["role"] for message in demonstration.messages]
        turns = [i for i, role in enumerate(roles) if role == "assistant"]
        return turns[-1:] if self.supervise == "last" else turns

    def _renderer(self, tools: list[Any] | None) -> "_Render":
        clock: dict[str, Any] = {} if self.day is None else {CLOCK: self.day.strftime}

        def render(messages: Messages, generation_prompt: bool = False) -> str:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **clock,
                )
            except Exception as error:  # a template is a program: it may raise anything
                raise UnusableError(f"the chat template says: {one_line(error)}") from error
            return str(text)

        return render

    def _tokenise(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Token ids [T] and their characters [T, 2], half-open."""
        tokens = self.tokenizer(
            text,
            add_special_tokens=self.template is None,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        input_ids = np.array(tokens["input_ids"], dtype=np.int32)
        offsets = _with_spaces(np.array(tokens["offset_mapping"], dtype=np.int64).reshape(-1, 2))
        if self.template is None and self._ends_twice(input_ids):
            return input_ids[:-1], offsets[:-1]
        return input_ids, offsets

    def _ends_twice(self, input_ids: NDArray[np.int32]) -> bool:
        """Whether the tokenizer has added an end-of-sequence token after ours."""
        ends = input_ids[-2:] == self.tokenizer.eos_token_id
        return self._adds_end and len(ends) > 1 and bool(ends.all())

    @cached_property
    def _adds_end(self) -> bool:
        """Whether the tokenizer ends every text with an end-of-sequence token of its own."""
        return self.tokenizer("a")["input_ids"][-1] == self.tokenizer.eos_token_id

    @cached_property
    def _end_of_turn(self) -> re.Pattern[str]:
        """What closes a turn: a special token, also after white space, or other text at once."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        special.update(map(str, self.tokenizer.all_special_tokens))
        longest_first = sorted(special, key=len, reverse=True)
        special_end = rf"\s*(?:{'|'.join(map(re.escape, longest_first))})|" if special else ""
        return re.compile(special_end + r"\S+")


def load_template(option: str, tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The chat template that `option` asks for: "tokenizer" (its own), "none", or a Jinja file.

    Raises UserError when there is none, or when it is not a template.
    """
    if option == "none":
        return None
    if option == "tokenizer":
        return _own_template(tokenizer)
    return _template_file(Path(option), tokenizer)


def _own_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"tokenizer {_name(tokenizer)} has no chat template of its own: "
            "give one with --template FILE, or --template none"
        ) from error


def _template_file(path: Path, tokenizer: "PreTrainedTokenizerFast") -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"template {path}: no such file (--template takes tokenizer, none, or a Jinja file)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {path}: cannot be read: {one_line(error)}") from error
    _check_syntax(path, template, tokenizer)
    return template


def _check_syntax(path: Path, template: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    from jinja2 import TemplateSyntaxError

    question = [{"role": "user", "content": "?"}]
    try:
        tokenizer.apply_chat_template(question, chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"template {path}, line {error.lineno}: not a Jinja template: {one_line(error)}"
        ) from error
    except Exception:  # it compiles; a lonely question may still not be to its liking
        return


_Render = Callable[..., str]


@dataclass(frozen=True)
class _Chat:
    """A conversation under a template, and where its turns lie in the rendered text."""

    render: _Render
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
class _Joined:
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


def _turn(
    turn: int, demonstration: Demonstration, layout: _Chat | _Joined, places: dict[int, Span]
) -> Turn:
    given = demonstration.weights[turn]
    place = places.get(turn)
    kept = layout.kept(turn) if place and _needs_content(given) else None
    content = demonstration.messages[turn]["content"]
    return Turn(f"messages[{turn}]", content, given, place, kept)


def _needs_content(given: TurnWeights | None) -> bool:
    return given is not None and (bool(given.spans) or given.tokens is not None)


def _with_spaces(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets [T, 2] without those of no width, which tokenizers that trim them (Llama 3) leave.

    Such a token is one of spaces: they begin where the token before it ends.
    """
    starts, ends = offsets.T
    before = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    return np.stack([starts, ends], axis=1)


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


def _check_end_token(tokenizer: "PreTrainedTokenizerFast") -> None:
    end = tokenizer.eos_token
    if end is None:
        raise UserError(
            f"tokenizer {_name(tokenizer)} has no end-of-sequence token, which --template none "
            "needs: give a chat template with --template FILE"
        )
    if tokenizer.encode(str(end), add_special_tokens=False) != [tokenizer.eos_token_id]:
        raise UserError(
            f"tokenizer {_name(tokenizer)} does not read its end-of-sequence token {end!r} as one "
            "token, which --template none needs: give a chat template with --template FILE"
        )


def _name(tokenizer: "PreTrainedTokenizerFast") -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
