"""Encodes a demonstration as an example: applies the chat template, tokenises, supervises.

A conversation is rendered and tokenised as a whole. A token is supervised when its characters
overlap those that the model would write: an assistant turn, from the end of the generation prompt
to the token that ends the turn, both as they appear in the rendering of the whole conversation.
`turns` locates them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError, one_line, reason
from ...pipeline.format.records import Reject, WeightedExample
from ..demonstrations.demonstration import Demonstration, Messages, Row, UnusableError
from ..demonstrations.messages import is_empty
from .forms import best_chat
from .renderings import Renderings
from .sandbox.environment import compiled, generated_spans
from .sandbox.overruns import Overruns
from .sandbox.watch import TooMuchError, watched
from .spans import Offsets, Span, Syntax, overlapping
from .template import CLOCK, name_of
from .token_weights import turn_of, weigh
from .turns import JoinedChat, TemplatedChat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
P = ParamSpec("P")
REASONING = {"reasoning_content", "reasoning", "thinking"}  # fields of a message
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_MOST_OF_TOKEN = 16  # characters; a token of text has four
_SHORT = 2**16  # characters
BATCH_CHARACTERS = 2**19


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A demonstration as tokens.

    `cut` if it was longer than the limit and was truncated; `empty` is the number of its empty
    answers, which are not supervised; `unread` are its fields of reasoning that the template does
    not name; `never_ends` if the template writes nothing that ends one of its answers; `masked` is
    the number of tokens that are not supervised because their weight is 0.
    """

    example: WeightedExample
    cut: bool
    empty: int = 0
    unread: frozenset[str] = frozenset()
    never_ends: bool = False
    masked: int = 0


@dataclass(frozen=True)
class Encoder:
    """Tokenises demonstrations and marks the supervised tokens.

    `template` is the text of a chat template, or None: then the contents are concatenated, each
    assistant turn followed by the end-of-sequence token, and the tokenizer adds its own special
    tokens. `tools_template` replaces it for demonstrations with tools. `supervise` is "assistant"
    (every assistant turn), "last" (the last of them) or "all" (every token but the first); tokens
    of weight 0 are not supervised. A demonstration of more than `max_length` tokens is rejected or
    cut, by `too_long`.

    Raises UserError for a tokenizer without character offsets or, if needed, end-of-sequence token.
    """

    tokenizer: "PreTrainedTokenizerFast"
    template: str | None
    max_length: int
    supervise: str = "assistant"
    too_long: str = "reject"
    vocab_size: int | None = None  # of the model, which may be smaller than the tokenizer's
    day: date | None = None  # passed to a template that asks for the time; None is now
    tools_template: str | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise UserError(
                f"tokenizer {name_of(self.tokenizer)} has no character offsets: "
                "use a model with a fast tokenizer (tokenizer.json)"
            )
        if self.template is None:
            _check_end_token(self.tokenizer)

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The special tokens that the template refers to by name.

        They are stored outside `tokenizer.json`, so the tokenizer's hash does not cover them.
        """
        written = f"{self.template or 'eos_token'}{self.tools_template or ''}"
        named = self.tokenizer.special_tokens_map
        return {name: named[name] for name in sorted(named) if name in written}

    def encode(self, demonstration: Demonstration) -> Encoded | Reject:
        """The tokens of a demonstration, or a reject with the reason why it cannot be used."""
        return next(self.encode_all([demonstration]))

    def encode_all(self, given: Iterable[Demonstration | Reject]) -> Iterator[Encoded | Reject]:
        """Encode each demonstration, as `encode` does; rejects are passed on.

        Several are tokenised at once. That releases the interpreter's lock once instead of once for
        each, and the tokenizer uses all cores.
        """
        for batch in _batches(map(self._render, given)):
            tokens = self._tokenise([each.text for each in batch if isinstance(each, _Rendered)])
            for each in batch:
                if isinstance(each, _Rendered):
                    yield self._or_reject(each.demonstration, self._supervised, each, *next(tokens))
                else:
                    yield each

    def _render(self, given: Demonstration | Reject) -> "_Rendered | Reject":
        if isinstance(given, Reject):
            return given
        encoder = self._with_tools if given.tools else self
        return self._or_reject(given, encoder._text_of, given)

    def _or_reject(
        self, demonstration: Demonstration, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | Reject:
        try:
            return call(*args, **kwargs)
        except UnusableError as error:
            return Reject(demonstration.source, demonstration.line, reason(error))
        except TooMuchError as error:
            return self._overruns.reject(demonstration, error)

    def _text_of(self, demonstration: Demonstration) -> "_Rendered":
        layout = watched(lambda: self._lay_out(demonstration))
        if self.too_long == "reject":
            self._refuse_long(layout.text)
        unread = self._unread(demonstration)
        return _Rendered(demonstration, layout, layout.text, unread)

    def _supervised(
        self, rendered: "_Rendered", input_ids: NDArray[np.int32], offsets: Offsets
    ) -> Encoded:
        """The supervised tokens of a rendering: `input_ids` [T], and their characters [T, 2]."""
        demonstration, layout = rendered.demonstration, rendered.layout
        cut = len(input_ids) > self.max_length
        if cut and self.too_long == "reject":
            raise UnusableError(f"{len(input_ids)} tokens, --max-length is {self.max_length}")
        if self.vocab_size is not None and input_ids.max(initial=0) >= self.vocab_size:
            raise UnusableError(f"a token is outside the model's vocabulary of {self.vocab_size}")

        turns = self._turns(demonstration)
        places = watched(lambda: layout.places(turns))
        supervised = overlapping(offsets, [span for spans in places.values() for span in spans])
        if self.supervise == "all":
            supervised[:] = True
        supervised[:1] = False  # nothing predicts the first token
        positions = np.flatnonzero(supervised[: self.max_length]).astype(np.int32)
        if not len(positions):
            where = f" among the first {self.max_length}" if cut else ""
            raise UnusableError(f"no supervised token{where}")
        weights = np.ones(len(positions), dtype=np.float32)
        if demonstration.weights:
            weighed = [turn_of(turn, demonstration, layout, places) for turn in turns]
            weights = weigh(layout.text, offsets, weighed)[positions]
        masked = int((weights == 0).sum())
        positions, weights = positions[weights != 0], weights[weights != 0]
        if not len(positions):
            raise UnusableError("every supervised token has the weight 0")
        input_ids = input_ids[: self.max_length]
        example = WeightedExample(demonstration.id, input_ids, positions, weights)
        empty = sum(is_empty(demonstration.messages[turn]) for turn in turns)
        never_ends = bool(places) and not any(
            _has_end(layout.text, spans, demonstration.messages[turn])
            for turn, spans in places.items()
        )
        return Encoded(example, cut, empty, rendered.unread, never_ends, masked)

    def _unread(self, demonstration: Demonstration) -> frozenset[str]:
        given = {key for message in demonstration.messages for key in REASONING & message.keys()}
        return frozenset(given - self._names)

    @cached_property
    def _names(self) -> set[str]:
        """The words of the template."""
        return set(re.findall(r"\w+", self.template or ""))

    def _lay_out(self, demonstration: Demonstration) -> TemplatedChat | JoinedChat:
        if self.template is None:
            for i, message in enumerate(demonstration.messages):
                if message.get("tool_calls"):
                    raise UnusableError(
                        f"--template none does not show the tool_calls of messages[{i}]: give a "
                        "chat template with --template FILE"
                    )
            return JoinedChat(demonstration.messages, str(self.tokenizer.eos_token))
        renderer = _Renderer(self, demonstration)
        renderings = Renderings(
            renderer.render, demonstration.messages, self._learned, renderer.variant
        )
        generated = renderer.generated if _GENERATION.search(self.template) else None
        chat = TemplatedChat(renderings, self._syntax, generated)
        return best_chat(chat)

    def _turns(self, demonstration: Demonstration) -> list[int]:
        """The turns to locate: supervised ones, unless all tokens are, and weighted ones."""
        if self.supervise == "all" and not demonstration.weights:
            return []
        turns = [
            i
            for i, message in enumerate(demonstration.messages)
            if message["role"] == "assistant" and i >= demonstration.prompt_length
        ]
        return turns[-1:] if self.supervise == "last" else turns

    def _refuse_long(self, text: str) -> None:
        """Raise UnusableError if the beginning of a text has too many tokens alone.

        A text of megabytes is then not tokenised as a whole.
        """
        beginning = text[: max(_SHORT, _MOST_OF_TOKEN * self.max_length)]
        if len(beginning) == len(text):
            return
        tokens = len(next(self._tokenise([beginning]))[0])
        if tokens > self.max_length + _MOST_OF_TOKEN:  # its last word may be cut
            raise UnusableError(f"more than {tokens} tokens, --max-length is {self.max_length}")

    def _tokenise(self, texts: list[str]) -> Iterator[tuple[NDArray[np.int32], Offsets]]:
        """Of each text the token ids [T] and the character range of each, half-open [T, 2]."""
        if not texts:
            return
        tokens = self.tokenizer(
            texts,
            add_special_tokens=self.template is None,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids, pairs in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            input_ids = np.array(ids, dtype=np.int32)
            offsets = _with_spaces(np.array(pairs, dtype=np.int64).reshape(-1, 2))
            if self.template is None and self._ends_twice(input_ids):
                input_ids, offsets = input_ids[:-1], offsets[:-1]
            yield input_ids, offsets

    def _ends_twice(self, input_ids: NDArray[np.int32]) -> bool:
        """Whether the tokenizer added an end-of-sequence token after ours."""
        ends = input_ids[-2:] == self.tokenizer.eos_token_id
        return self._adds_end and len(ends) > 1 and bool(ends.all())

    @cached_property
    def _adds_end(self) -> bool:
        """Whether the tokenizer appends an end-of-sequence token to every text."""
        return self.tokenizer("a")["input_ids"][-1] == self.tokenizer.eos_token_id

    @cached_property
    def _with_tools(self) -> "Encoder":
        """The encoder of demonstrations with tools."""
        if self.tools_template is None:
            return self
        return replace(self, template=self.tools_template, tools_template=None)

    @cached_property
    def _overruns(self) -> Overruns:
        return Overruns("the chat template", "give another with --template FILE")

    @cached_property
    def _learned(self) -> dict[Any, Any]:
        """What is known of the template's literals, for all demonstrations."""
        return {}

    @cached_property
    def _syntax(self) -> Syntax:
        tokenizer = self.tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        special.update(map(str, tokenizer.all_special_tokens))
        begins_only = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None
        return Syntax(sorted(special), None if begins_only is None else str(begins_only))


class _Renderer:
    """Renders conversations as a demonstration's is: with its tools and arguments."""

    def __init__(self, encoder: Encoder, demonstration: Demonstration) -> None:
        day, tools = encoder.day, demonstration.tools
        self._template = encoder.template or ""
        self._arguments = {
            **encoder.tokenizer.special_tokens_map,
            "tools": tools,
            "documents": None,
            **({} if day is None else {CLOCK: day.strftime}),
            **demonstration.template_kwargs,
        }
        self.variant = json.dumps([bool(tools), demonstration.template_kwargs], default=str)

    def render(self, messages: Messages, prompt: bool = False) -> str:
        given = {"messages": messages, "add_generation_prompt": prompt}
        return self._run(lambda: compiled(self._template).render(self._arguments, **given))

    def generated(self, messages: Messages) -> list[Span]:
        """The characters within {% generation %} in the rendering."""
        given = {**self._arguments, "messages": messages, "add_generation_prompt": False}
        return self._run(lambda: generated_spans(compiled(self._template), given))

    def _run(self, render: Callable[[], T]) -> T:
        try:
            return render()
        except TooMuchError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise UnusableError(f"the template fails on this row: {one_line(error)}") from error


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A demonstration as text."""

    demonstration: Demonstration
    layout: TemplatedChat | JoinedChat
    text: str
    unread: frozenset[str]


def _batches(given: Iterable[_Rendered | Reject]) -> Iterator[list[_Rendered | Reject]]:
    """Batches of up to BATCH_CHARACTERS, so that the memory for their tokens has a limit."""
    batch: list[_Rendered | Reject] = []
    characters = 0
    for each in given:
        batch.append(each)
        characters += len(each.text) if isinstance(each, _Rendered) else 0
        if characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _has_end(text: str, spans: list[Span], message: Row) -> bool:
    """Whether a turn goes on after its content: with a token that ends it, or with calls."""
    written = text[spans[0][0] : spans[-1][1]].rstrip()
    return bool(message.get("tool_calls")) or not written.endswith(message["content"].rstrip())


def _with_spaces(offsets: Offsets) -> Offsets:
    """Offsets [T, 2] in which tokens of spaces have a width again.

    Tokenizers that trim offsets (Llama 3) give such a token none; its spaces begin where the token
    before it ends.
    """
    starts, ends = offsets.T
    before = np.maximum.accumulate(np.concatenate([[0], ends]))[:-1]
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    return np.stack([starts, ends], axis=1)


def _check_end_token(tokenizer: "PreTrainedTokenizerFast") -> None:
    end = tokenizer.eos_token
    if end is None:
        raise UserError(
            f"tokenizer {name_of(tokenizer)} has no end-of-sequence token, which --template none "
            "needs: give a chat template with --template FILE"
        )
    if tokenizer.encode(str(end), add_special_tokens=False) != [tokenizer.eos_token_id]:
        raise UserError(
            f"tokenizer {name_of(tokenizer)} does not read its end-of-sequence token {end!r} as "
            "one token, which --template none needs: give a chat template with --template FILE"
        )
