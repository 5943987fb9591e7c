"""Options of a command, each declared once, in the metadata of a field of a settings dataclass.

The annotation of the field gives the type of the option and, for a `Literal`, its choices. The
command line makes an option of every such field; `check` checks the values, from any source. Begin
with `option`.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from math import inf
from typing import Any, Literal, TypeVar, get_args, get_origin

from .errors import UserError, option_of, require

_KEY = "option"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`; `above` and `below` exclude the bound itself. Excludes NaN."""

    low: float
    high: float = inf
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        is_above = number > self.low if self.above else number >= self.low
        return is_above and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.above else f"{self.low:,}"
        if self.high == inf:
            return low if self.above else f"{low} or more"
        if self.below:
            return f"{low}{'' if self.above else ' or more'}, below {self.high:,}"
        return f"{low}{', up to' if self.above else ' to'} {self.high:,}"


@dataclass(frozen=True, slots=True)
class Option:
    """What the annotation and the default of a field do not give."""

    help: str
    range: Range | None
    metavar: str | None
    names: tuple[str, ...]  # empty: the name of the field
    in_identity: bool


def about(
    help: str,
    *,
    range: Range | None = None,
    metavar: str | None = None,
    names: tuple[str, ...] = (),
    in_identity: bool = True,
) -> Mapping[str, Option]:
    """The metadata of a field that is an option; used directly for a field without a default.

    `in_identity` is False if the value does not change what is stored.
    """
    return {_KEY: Option(help, range, metavar, names, in_identity)}


def option(default: T, help: str, **others: Any) -> T:
    """A field that is an option with a default; `others` are arguments of `about`."""
    # `dataclass` sees a field, a type checker the default
    return field(default=default, metadata=about(help, **others))


def described(settings: Any) -> dict[Field[Any], Option]:
    """The fields of a settings dataclass that are options, in order."""
    return {each: each.metadata[_KEY] for each in fields(settings) if _KEY in each.metadata}


def names_of(each: Field[Any], option: Option) -> tuple[str, ...]:
    """The names of an option on the command line, the main one first."""
    return option.names or (option_of(each.name),)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The values of the `Literal` in an annotation; empty if there is none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in choices_of(part))


def check(settings: Any) -> None:
    """Raise UserError for a value that its field does not allow; None is always allowed."""
    for each, about in described(settings).items():
        value = getattr(settings, each.name)
        if value is None:
            continue
        name, choices = names_of(each, about)[0], choices_of(each.type)
        if about.range is not None:
            require(value in about.range, name, value, str(about.range))
        for one in (value if isinstance(value, tuple) else (value,)) if choices else ():
            if one not in choices:
                raise UserError(f"{name} {one} is not known: give {', '.join(choices)}")
