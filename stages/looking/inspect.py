"""`qpipe inspect`: summarises a folder and selects some of its examples."""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.progress import progress_bar
from .examples import Companion, Look, base_scores, looks, open_examples, parts_of
from .measures import MEASURES
from .overview import Overview, folder_json
from .settings import InspectSettings
from .token_text import TokenText, token_text

SHOWN = 3  # examples, by default
_ENDS = ("lowest", "highest", "largest")


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of `inspect`."""

    folder: SealedFolder
    overview: Overview
    examples: list[Look]
    colour_by: str
    sorted_by: str | None
    text: TokenText
    notes: list[str] = field(default_factory=list)


def inspect(settings: InspectSettings) -> Inspection:
    """Read the folder once. Raises UserError for options that do not apply to it."""
    _check(settings)
    main = open_examples(settings.folder)
    companions = _companions(main, settings)
    text, note = token_text(main.manifest, settings.model)
    overview = Overview()
    every = _every(settings, main, companions, overview)
    sort = _sort(settings)
    examples = _extremes(settings, sort, every) if sort else _chosen(settings, main, every)
    deque(every, maxlen=0)  # the rest, for the summary
    notes = [*([note] if note else []), *_left_out(companions, overview)]
    missing = sorted(set(settings.ids) - {each.id for each in examples})
    if missing:
        raise UserError(
            f"--id {missing[0]}: no such example in {main.path}: --random 5 shows some ids"
        )
    colour_by = settings.colour_by or _colour_by(main, settings, overview)
    sorted_by = sort.partition("-")[2] if sort else None
    return Inspection(main, overview, examples, colour_by, sorted_by, text, notes)


def _every(
    settings: InspectSettings,
    main: SealedFolder,
    companions: dict[str, Companion],
    overview: Overview,
) -> Iterator[Look]:
    """Yield every example of a folder, and add it to the overview."""
    with progress_bar(total=main.size, desc="inspect", unit="demo") as progress:
        for group in looks(main, companions):
            _check_measures(settings, main, group[0])
            overview.add(group)
            progress.update(len(group))
            yield from group


def _sort(settings: InspectSettings) -> str | None:
    """The order of the examples, such as highest-kl; None if they are chosen otherwise."""
    if settings.ids or settings.random is not None:
        return None
    return settings.sort or ("highest-tv" if settings.against is not None else None)


def _extremes(settings: InspectSettings, sort: str, every: Iterable[Look]) -> list[Look]:
    """The examples with the highest or lowest mean of a measure."""
    end, _, measure = sort.partition("-")
    most = SHOWN if settings.examples is None else settings.examples
    first = heapq.nsmallest if end == "lowest" else heapq.nlargest
    return first(most, (each for each in every if len(each.positions)), lambda e: e.mean(measure))


def _chosen(settings: InspectSettings, main: SealedFolder, every: Iterable[Look]) -> list[Look]:
    """The examples with the given ids, some at random, or the first ones; in the folder's order."""
    if settings.ids:
        return [each for each in every if each.id in settings.ids]
    if settings.random is not None:
        order = np.random.default_rng(settings.seed).permutation(main.size)
        numbers = set(order[: settings.random].tolist())
    else:
        numbers = range(SHOWN if settings.examples is None else settings.examples)
    return [each for each in every if each.number in numbers]


def inspection_json(found: Inspection, alternatives: int) -> dict[str, Any]:
    """The result as JSON values."""
    return {
        "folder": folder_json(found.folder),
        "notes": found.notes,
        "summary": found.overview.as_json(),
        "examples": [look_json(look, found.text, alternatives) for look in found.examples],
    }


def look_json(look: Look, text: TokenText, alternatives: int) -> dict[str, Any]:
    """An example as JSON values: its tokens, and the measures of the supervised ones."""
    ids = look.input_ids.tolist()
    tokens: list[dict[str, Any]] = [
        {"id": token_id, "text": piece}
        for token_id, piece in zip(ids, text.pieces(ids), strict=True)
    ]
    others = alternatives_of(look, alternatives)
    for place, position in enumerate(look.positions.tolist()):
        tokens[position] |= {name: float(values[place]) for name, values in look.values.items()}
        if alternatives:
            tokens[position]["alternatives"] = {
                role: [
                    {"id": number, "text": text.alone(number), "probability": probability}
                    for number, probability in rows
                ]
                for role, rows in others[place].items()
            }
    means = {name: look.mean(name) for name in look.values}
    return {"id": look.id, "number": look.number, "means": means, "tokens": tokens}


def alternatives_of(look: Look, most: int) -> list[dict[str, list[tuple[int, float]]]]:
    """At each supervised position, the most probable tokens of each distribution."""
    by_role = {
        role: [
            list(zip(ids[:most].tolist(), probs[:most].tolist(), strict=True))
            for ids, probs in zip(
                parts_of(panel.ids, panel.counts), parts_of(panel.probs, panel.counts), strict=True
            )
        ]
        for role, panel in look.panels.items()
    }
    return [
        {role: rows[place] for role, rows in by_role.items()}
        for place in range(len(look.positions))
    ]


def _check(settings: InspectSettings) -> None:
    options = {"--id": settings.ids or None, "--random": settings.random, "--sort": settings.sort}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one")
    if settings.examples is not None and given not in ([], ["--sort"]):
        raise UserError(
            f"-n {settings.examples}: cannot be combined with {given[0]}, which determines the "
            "number: leave it out"
        )
    if settings.sort is not None:
        end, dash, measure = settings.sort.partition("-")
        if end not in _ENDS or not dash or measure not in MEASURES:
            raise UserError(
                f"--sort {settings.sort}: give lowest- or highest- and one of {', '.join(MEASURES)}"
            )
    if settings.colour_by is not None and settings.colour_by not in MEASURES:
        raise UserError(f"--colour-by {settings.colour_by}: give one of {', '.join(MEASURES)}")
    if settings.against is not None and settings.scores is not None:
        raise UserError("--against and --scores exclude each other: give one")


def _check_measures(settings: InspectSettings, main: SealedFolder, look: Look) -> None:
    sort = settings.sort.partition("-")[2] if settings.sort else None
    for option, name in (("--sort", sort), ("--colour-by", settings.colour_by)):
        if name is not None and name not in look.values:
            more = "--scores or --against" if main.has_targets else "--against"
            ways = {"kl": f"give {more}", "tv": "give --against", "other": "give --against"}
            way = ways.get(name, f"there are {', '.join(look.values)}, and more with {more}")
            raise UserError(f"{option} {name}: {settings.folder} does not have it: {way}")


def _companions(main: SealedFolder, settings: InspectSettings) -> dict[str, Companion]:
    if settings.against is not None:
        return {"other": Companion(main, open_examples(settings.against))}
    return {} if settings.scores is None else {"base": base_scores(main, settings.scores)}


def _left_out(companions: dict[str, Companion], overview: Overview) -> list[str]:
    """A line for each companion that lacks examples. Raises UserError if no example is left."""
    lines = []
    for companion in companions.values():
        counts = ((companion.missing, "are not in it"), (companion.differing, "have other tokens"))
        parts = ", ".join(f"{count:,} {what}" for count, what in counts if count)
        path = companion.folder.path
        if parts and not overview.examples:
            raise UserError(
                f"{path}: no example in common: {parts}: give a folder of the same demonstrations"
            )
        lines += [f"{path}: examples left out: {parts}."] if parts else []
    return lines


def _colour_by(main: SealedFolder, settings: InspectSettings, overview: Overview) -> str:
    if settings.against is not None:
        return "tv"
    if not main.has_targets:
        return "base"
    trust = overview.spreads.get("trust")
    if trust is None or not trust.is_constant:
        return "trust"
    return "target" if settings.scores is None else "base"  # trust would have one colour
