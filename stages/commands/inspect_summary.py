"""Prints what `qpipe inspect` found: a summary, and examples with tokens coloured by a measure.

Without colours, a small digit marks a token. Text from the data is printed only through `TokenText`
and `escaped`.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import escaped
from ..looking.examples import Look
from ..looking.inspect import Inspection, alternatives_of
from ..looking.measures import MEASURES, Scale
from ..looking.overview import Overview, folder_json, mapped_of
from ..looking.token_text import TokenText, one_line_of
from .ceiling_summary import mapped_rows
from .tables import print_table

# backgrounds of the 256-colour palette, from none over amber to rust; legible without telling hues
_INKS: tuple[int | None, ...] = (None, 230, 229, 222, 215, 208, 166)
_DIFFERENCE_INKS: tuple[int | None, ...] = (208, 215, 223, None, 153, 111, 69)
_BARS = "▁▂▃▄▅▆▇█"
_DIGITS = "₀₁₂₃₄₅₆₇₈₉"
_CONTINUED = "‥"  # a token that continues a character


class _Colours(NamedTuple):
    """How the values of a scale are coloured, and the words of the legend."""

    strength: Callable[[float], float]
    digit: str  # meaning of a digit
    ends: tuple[str, str]  # values at both ends of the colours


_COLOURS: dict[Scale, _Colours] = {
    "share": _Colours(lambda share: 1 - share, "tenths below 1", ("1", "0")),
    "distance": _Colours(lambda distance: distance, "tenths", ("0", "1")),
    "nats": _Colours(lambda nats: nats / 4, "tenths of 4 nats", ("0", "4 nats or more")),
    "rank": _Colours(
        lambda rank: math.log10(max(rank, 1.0)) / 3,
        "tenths of the logarithm, up to rank 1,000",
        ("1", "1,000 or more"),
    ),
    "difference": _Colours(lambda difference: difference, "tenths", ("−1", "1")),
}


def use_colour(wanted: bool | None) -> bool:
    """Whether to colour; by default, on a terminal unless NO_COLOR is set."""
    if wanted is not None:
        return wanted
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def ink(scale: Scale, value: float) -> float:
    """The strength of a value's colour, from 0 to 1; from −1 to 1 for a difference.

    Small shares, large distances, entropies and losses, and far ranks have strong colours.
    """
    lowest = -1.0 if scale == "difference" else 0.0
    return min(max(_COLOURS[scale].strength(value), lowest), 1.0)


def print_inspection(found: Inspection, alternatives: int, colour: bool) -> None:
    """Print the summary, then the examples."""
    _print_summary(found)
    for line in found.notes:
        click.echo(escaped(line))
    if found.examples:
        click.echo(f"\n{_legend(found.colour_by, colour)}", color=colour)
    for look in found.examples:
        click.echo(f"\n{_head(look, found)}")
        click.echo(tokens_line(look, found.text, found.colour_by, colour), color=colour)
        if alternatives:
            _print_alternatives(look, found, alternatives)


def tokens_line(look: Look, text: TokenText, measure: str, colour: bool) -> str:
    """The text of an example, with supervised tokens coloured or marked by a measure."""
    values = dict(zip(look.positions.tolist(), look.values[measure].tolist(), strict=True))
    scale = MEASURES[measure].scale
    parts = []
    for position, piece in enumerate(text.pieces(look.input_ids.tolist())):
        shown = (piece or _CONTINUED).replace("\t", "⇥")
        if position not in values:
            parts.append(click.style(shown, dim=True) if colour else shown)
        elif colour:
            parts.append(_inked(shown.replace("\n", "↵\n"), ink(scale, values[position]), scale))
        else:
            parts.append(_marked(shown, ink(scale, values[position])))
    return "".join(parts)


def sparkline(bins: Sequence[int] | NDArray[np.int64]) -> str:
    """A histogram as one line of bars, with a blank for an empty bin."""
    most = max(max(bins), 1)
    return "".join(_BARS[min(int(8 * each / most), 7)] if each else " " for each in bins)


def _inked(shown: str, strength: float, scale: Scale) -> str:
    if scale == "difference":
        colour = _DIFFERENCE_INKS[round((strength + 1) * 3)]
    else:
        colour = _INKS[math.ceil(strength * (len(_INKS) - 1) - 0.25)]
    if colour is None:
        return shown
    lines = (click.style(line, fg=16, bg=colour) if line else "" for line in shown.split("\n"))
    return "\n".join(lines)


def _marked(shown: str, strength: float) -> str:
    """A token with the tenths of the strength as a digit after it."""
    tenths = min(int(abs(strength) * 10 + 0.5), 9)
    if not tenths:
        return shown.replace("\n", "↵\n")
    mark = ("₋" if strength < 0 else "") + _DIGITS[tenths]
    body = shown.rstrip("\n")
    ends = shown[len(body) :]
    return f"{body.replace(chr(10), '↵' + chr(10))}{'↵' if ends else ''}{mark}{ends}"


def _legend(measure: str, colour: bool) -> str:
    what = MEASURES[measure]
    about = f"{what.title}, {what.words}"
    _, digit, (first, last) = _COLOURS[what.scale]
    if not colour:
        return f"Marked: {about}. A small digit: {digit}; none is 0."
    inks = _DIFFERENCE_INKS if what.scale == "difference" else _INKS
    bar = "".join(click.style("  ", bg=each) if each else "  " for each in inks)
    return f"{about}: {first} {bar} {last}. Dim text is not supervised."


def _head(look: Look, found: Inspection) -> str:
    names = [found.colour_by, *([found.sorted_by] if found.sorted_by else []), "nll", "kl"]
    means = [
        f"{MEASURES[name].title} {look.mean(name):.4g}"
        for name in dict.fromkeys(names)
        if name in look.values
    ]
    size = f"{len(look.positions):,} of {len(look.input_ids):,} tokens supervised"
    return f"── {escaped(one_line_of(look.id))} · {size} · mean {', '.join(means)}"


def _print_summary(found: Inspection) -> None:
    about = folder_json(found.folder)
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in about["settings"].items())
    rows = [
        (about["stage"], escaped(about["path"])),
        ("made with", escaped(f"{about['model'] or 'a model'}: {settings}")),
        ("demonstrations", f"{about['examples']:,}, {about['rejected']:,} rejected"),
        ("tokens", f"{about['tokens']:,}, {about['supervised_tokens']:,} supervised"),
        ("mean support", f"{about['mean_support']:.1f} entries"),
    ]
    if about["supervised_tokens"]:
        rows.append(("kept mass", f"{about['kept_mass']:.4f}"))
        rows.append(("bytes a token", f"{about['bytes_per_token']:.1f}"))
    rows += mapped_rows(mapped_of(found.folder.manifest))
    print_table(rows)
    if found.overview.positions:
        click.echo()
        _print_spreads(found.overview)


def _print_spreads(overview: Overview) -> None:
    rows: list[tuple[str, ...]] = [("", "mean", "lowest", "highest", "histogram", "")]
    for name, spread in overview.spreads.items():
        measure = MEASURES[name]
        first, last = (
            (measure.labels[0], measure.labels[-1])
            if measure.labels
            else (f"{measure.edges[0]:g}", f"{measure.edges[-1]:g}{'+' * measure.is_open}")
        )
        numbers = (f"{each:.4g}" for each in (overview.mean(name), spread.low, spread.high))
        rows.append((measure.title, *numbers, f"▕{sparkline(spread.bins)}▏", f"{first} … {last}"))
    print_table(rows)


def _print_alternatives(look: Look, found: Inspection, most: int) -> None:
    pieces = found.text.pieces(look.input_ids.tolist())
    rows = [("", "token", found.colour_by, *look.panels)]
    for place, others in enumerate(alternatives_of(look, most)):
        position = int(look.positions[place])
        cells = (
            "  ".join(
                f"{one_line_of(found.text.alone(number))} {probability:.1%}"
                for number, probability in others[role]
            )
            for role in look.panels
        )
        shown = one_line_of(pieces[position]) or _CONTINUED
        rows.append((str(position), shown, f"{look.values[found.colour_by][place]:.4g}", *cells))
    print_table(rows)


def _setting(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_setting(each)}" for name, each in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else escaped(str(value))
