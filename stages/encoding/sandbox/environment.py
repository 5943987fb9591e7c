"""Compiles and renders templates as transformers or Jinja does, with limits for each operation.

Filters, functions and extensions are those of their own environments. Operations that make a
huge value at once, which no other thread could end, are refused before they are done.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from itertools import islice
from types import BuiltinMethodType
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, nodes
from jinja2.compiler import CodeGenerator
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..spans import Span
from .watch import watched

MOST_TEXT = 1 << 26  # characters of a rendering, or of any text in it
_MOST_PRODUCT = 1 << 28  # of the lengths of the texts that an operation combines
_MOST_NUMBER = 10**6  # widths and the like
_MOST_BITS = 1 << 14  # of a product of whole numbers
_ITEM = 512  # characters that an item of a list counts as
_PIECES = 1 << 12
_WIDE = re.compile(r"\d{7}|\*|:[^{}]*\{")  # widths in a format string: large, or given elsewhere

_FILTERS = ("batch", "center", "indent", "join", "pprint", "replace", "slice", "string")
_MORE_FILTERS = ("sum", "tojson", "truncate", "urlize", "wordwrap", "xmlattr")
_METHODS = {"center", "expandtabs", "join", "ljust", "replace", "rjust", "translate", "zfill"}


class LimitError(Exception):
    """Raised in a template for what would be too large."""


class _Code(CodeGenerator):
    def visit_Add(self, node: nodes.Add, frame: Any) -> None:  # noqa: N802
        """A sum; with a constant, as in most templates, it is not looked at."""
        if not isinstance(node.left, nodes.Const) and not isinstance(node.right, nodes.Const):
            super().visit_Add(node, frame)
            return
        self.write("(")
        self.visit(node.left, frame)
        self.write(" + ")
        self.visit(node.right, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The pieces as one text, up to MOST_TEXT."""
        remaining, text = iter(pieces), ""
        while some := list(islice(remaining, _PIECES)):
            text += "".join(some)
            if len(text) > MOST_TEXT:
                raise LimitError(f"it writes more than {MOST_TEXT:,} characters")
            if len(some) < _PIECES:
                break
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A sum, product, power or formatting, if it is not too large."""
        if operator == "+":
            is_sized = hasattr(left, "__len__") and hasattr(right, "__len__")
            refuse_if(is_sized and len(left) + len(right) > MOST_TEXT)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            refuse_if(operator != "%" and bits > _MOST_BITS)
        elif operator == "%":
            _refuse_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            number, several = (left, right) if isinstance(left, int) else (right, left)
            refuse_if(isinstance(number, int) and _size(several) * number > _MOST_NUMBER)
        return self.binop_table[operator](left, right)

    def call(self, context: Any, call: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, if what it makes is not too large."""
        method = getattr(call, "__wrapped__", call)  # of a format method, which Jinja wraps
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str):
            if method.__name__ in ("format", "format_map"):
                _refuse_format(method.__self__, (*args, *kwargs.values()))
            elif method.__name__ in _METHODS:
                _refuse_large(method.__self__, *args, *kwargs.values())
        return super().call(context, call, *args, **kwargs)


def refuse_if(is_large: bool) -> None:
    if is_large:
        raise LimitError("it asks for a huge number or text")


def _refuse_format(text: Any, values: Iterable[Any]) -> None:
    refuse_if(isinstance(text, str) and _WIDE.search(text) is not None)
    for value in values:
        _size(value)


def _refuse_large(value: Any, *arguments: Any) -> None:
    """Refuse what may repeat a text as often as another is long, or as a number says."""
    product = _size(value)
    for each in arguments:
        refuse_if(isinstance(each, int) and each > _MOST_NUMBER)
        product *= max(1, _size(each))
    refuse_if(product > _MOST_PRODUCT)


def _size(value: Any) -> int:
    """The approximate length of a value as text, which must not exceed MOST_TEXT.

    A list may hold another many times, and so on.
    """
    if isinstance(value, str):
        return len(value)
    size, remaining = 1, [value]
    while remaining:
        each = remaining.pop()
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, dict | list | tuple):
            size += _ITEM * len(each)
            remaining.extend(each.values() if isinstance(each, dict) else each)
        refuse_if(size > MOST_TEXT)
    return size


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    takes_context = hasattr(call, "jinja_pass_arg")

    @wraps(call)  # keeps that mark
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _refuse_large(*args[takes_context:], *kwargs.values())
        return call(*args, **kwargs)

    return guarded


def _formatted(text: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's filter `format`."""
    _refuse_format(text, (*args, *kwargs.values()))
    return do_format(text, *args, **kwargs)


def _text(value: Any) -> str:
    """As `str`, in the code of a template."""
    if type(value) is str:
        return value
    _size(value)
    return str(value)


def _joined(values: Iterable[Any]) -> str:
    """As Jinja's operator ~."""
    texts = [_text(value) for value in values]
    refuse_if(sum(map(len, texts)) > MOST_TEXT)
    return "".join(texts)


@lru_cache(maxsize=16)
def compiled(template: str) -> Template:
    """A chat template, to be rendered with limits. Raises jinja2.TemplateSyntaxError."""
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
    )

    return _compiled(template, _compile_jinja_template("").environment)


def compiled_plainly(template: str) -> Template:
    """As `compiled`, for a template of Jinja alone, to which a missing name is an error."""
    return _compiled(template, ImmutableSandboxedEnvironment(undefined=StrictUndefined))


def _compiled(template: str, theirs: Environment) -> Template:
    """A template with limits; otherwise it is rendered as in another environment."""
    ours = _Sandbox(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        undefined=theirs.undefined,
        extensions=[type(each) for each in theirs.extensions.values()],
    )
    ours.globals |= theirs.globals
    guarded = {name: _guarded(theirs.filters[name]) for name in (*_FILTERS, *_MORE_FILTERS)}
    ours.filters |= theirs.filters | guarded | {"format": _formatted}
    made = watched(lambda: ours.from_string(template))
    # What the code of a template calls by these names.
    made.root_render_func.__globals__.update(str=_text, str_join=_joined)
    return made


def generated_spans(template: Template, arguments: dict[str, Any]) -> list[Span]:
    """The characters within {% generation %} in a rendering."""
    blocks: list[str] = []
    spans: list[Span] = []
    with template.environment.activate_tracker(blocks, spans):  # pyright: ignore
        blocks.extend(template.generate(**arguments))
    return spans
