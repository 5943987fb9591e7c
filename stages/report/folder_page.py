"""The data of a folder's page: its summary, and its demonstrations in chunks.

The page holds a sample if there are more demonstrations than requested or than fit; the summary
always covers all of them.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError, escaped
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.progress import progress_bar
from ..looking.examples import Companion, Look, base_scores, looks, open_examples, role_of
from ..looking.measures import MEASURES
from ..looking.overview import Overview, folder_json
from ..looking.token_text import TokenText, one_line_of, token_text
from .pack import Alternatives, alternatives, compressed, packed, quantised
from .settings import ReportSettings

CHUNK = 16  # demonstrations unpacked together
MEGABYTE = 10**6
# measures that tokens can be coloured by, and how their values are stored
_COLUMNS = {
    "trust": "share",
    "weight": "share",
    "target": "log-prob",
    "base": "log-prob",
    "teacher": "log-prob",
    "entropy": "nats",
    "base-entropy": "nats",
    "rank": "rank",
    "base-rank": "rank",
    "kl": "nats",
}


@dataclass(frozen=True, slots=True)
class Page:
    """The content of a page: JSON values, and chunks of text with the demonstrations."""

    title: str
    head: str
    chunks: list[str]
    notes: list[str]


@dataclass(slots=True, eq=False)
class Entry:
    """One demonstration, quantised; tokens are indices into the `Vocabulary`."""

    look_id: str
    number: int
    tokens: NDArray[np.int64]  # [T]
    is_supervised: NDArray[np.uint8]  # [T]
    columns: dict[str, NDArray[np.uint16]]  # [N] each
    others: Alternatives
    other_tokens: NDArray[np.int64]  # [R]
    means: dict[str, float]


@dataclass(slots=True)
class Vocabulary:
    """The tokens on a page, each with its text, numbered in order of appearance."""

    numbers: dict[tuple[int, str], int] = field(default_factory=dict)
    uses: Counter[int] = field(default_factory=Counter)

    def add(self, ids: Sequence[int], pieces: Sequence[str]) -> NDArray[np.int64]:
        """Add tokens and return their indices."""
        keys = zip(ids, pieces, strict=True)
        found = [self.numbers.setdefault(key, len(self.numbers)) for key in keys]
        self.uses.update(found)
        return np.array(found, np.int64)

    def by_use(self) -> tuple[list[tuple[int, str]], NDArray[np.int64]]:
        """The tokens, most used first, and the position of each index in that order."""
        order = [number for number, _ in self.uses.most_common()]
        places = np.zeros(len(order), np.int64)
        places[order] = np.arange(len(order))
        keys = list(self.numbers)
        return [keys[number] for number in order], places


def folder_page(settings: ReportSettings) -> Page:
    """Read the folder once and make its page."""
    main = open_examples(settings.folder)
    companions = _companions(main, settings)
    text, note = token_text(main.manifest, settings.model)
    order = np.random.default_rng(settings.seed).permutation(main.size)
    drawn = set(order[: settings.examples].tolist())
    overview, vocabulary, entries = Overview(), Vocabulary(), []
    with progress_bar(total=main.size, desc="report", unit="demo") as progress:
        for group in looks(main, companions):
            overview.add(group)
            entries += [
                _entry(look, text, vocabulary, settings.alternatives)
                for look in group
                if look.number in drawn
            ]
            progress.update(len(group))
    if not overview.examples:
        raise UserError(
            f"{main.path}: no example in common with the other folders: give folders of the same "
            "demonstrations"
        )
    notes = [note] if note else []
    if len(drawn) < main.size:
        notes.append(f"{len(drawn):,} of {main.size:,} demonstrations are shown, drawn at random.")
    for role, companion in companions.items():
        left_out = companion.missing + companion.differing
        if left_out:
            notes.append(f"{left_out:,} demonstrations are left out: not the same in {role}.")
    facts = _facts(main, companions, overview, notes)
    return _fitting(settings, facts, entries, vocabulary, order.tolist())


def _companions(main: SealedFolder, settings: ReportSettings) -> dict[str, Companion]:
    companions = {}
    if settings.scores is not None:
        companions["base"] = base_scores(main, settings.scores)
    if settings.teacher is not None:
        companions["teacher"] = Companion(main, open_sealed(settings.teacher, "score"))
    return companions


def _entry(look: Look, text: TokenText, vocabulary: Vocabulary, most: int) -> Entry:
    ids = look.input_ids.tolist()
    is_supervised = np.zeros(len(ids), np.uint8)
    is_supervised[look.positions] = 1
    others = alternatives(look.panels, look.observed_ids, most)
    other_ids = others.ids.tolist()
    return Entry(
        look.id,
        look.number,
        vocabulary.add(ids, text.pieces(ids)),
        is_supervised,
        {
            name: quantised(_COLUMNS[name], values)
            for name, values in look.values.items()
            if name in _COLUMNS
        },
        others,
        vocabulary.add(other_ids, [text.alone(each) for each in other_ids]),
        {name: look.mean(name) for name in look.values},
    )


def _facts(
    main: SealedFolder, companions: Mapping[str, Companion], overview: Overview, notes: list[str]
) -> dict[str, Any]:
    """The data of the page apart from the demonstrations."""
    roles = [role_of(main), *companions]
    names = [name for name in MEASURES if name in overview.spreads]
    colours = [name for name in names if name in _COLUMNS or name == "gain"]
    spreads = overview.spreads
    constant = [n for n in ("trust", "weight") if n in spreads and spreads[n].is_constant]
    return {
        "kind": "folder",
        "folder": _shown(folder_json(main)),
        "beside": {role: _shown(folder_json(each.folder)) for role, each in companions.items()},
        "summary": overview.as_json(),
        "roles": roles,
        "measures": {
            name: {
                "title": MEASURES[name].title,
                "words": MEASURES[name].words,
                "scale": MEASURES[name].scale,
            }
            for name in names
        },
        "colours": [name for name in colours if not (name == "weight" and name in constant)],
        "constant": constant,
        "columns": [[name, _COLUMNS[name]] for name in names if name in _COLUMNS],
        "notes": notes,
    }


def _shown(facts: dict[str, Any]) -> dict[str, Any]:
    """Texts from a manifest, with control and invisible characters escaped."""
    return facts | {
        name: escaped(facts[name]) for name in ("path", "model") if facts[name] is not None
    }


def _fitting(
    settings: ReportSettings,
    facts: dict[str, Any],
    entries: list[Entry],
    vocabulary: Vocabulary,
    order: Sequence[int],
) -> Page:
    """The page with as many random demonstrations as fit into its file."""
    limit = settings.max_megabytes * MEGABYTE
    drawn_at = {number: place for place, number in enumerate(order)}
    kept, notes = entries, list(facts["notes"])
    tokens, places = vocabulary.by_use()
    while True:
        chunks = _chunks(kept, tokens, places, facts)
        head = _head(facts | {"notes": notes}, kept)
        size = len(head) + sum(map(len, chunks))
        if size <= limit:
            break
        share = 0.97 * limit / size
        most = min(int(len(kept) * share), len(kept) - 1)
        if most < 1:
            raise UserError(
                f"--max-megabytes {settings.max_megabytes:g}: not one demonstration fits: give "
                f"{size / len(kept) / MEGABYTE + 1:.0f} or more"
            )
        kept = sorted(kept, key=lambda entry: drawn_at[entry.number])[:most]
        kept.sort(key=lambda entry: entry.number)
        notes = [
            *facts["notes"],
            f"{len(kept):,} of them fit in {settings.max_megabytes:g} MB, drawn at random: "
            "--max-megabytes, or fewer --alternatives, show more.",
        ]
    return Page(settings.folder.resolve().name, head, chunks, notes)


def _head(facts: dict[str, Any], entries: Sequence[Entry]) -> str:
    names = list(entries[0].means) if entries else []
    examples = {
        "ids": [escaped(one_line_of(entry.look_id)) for entry in entries],
        "numbers": [entry.number for entry in entries],
        "tokens": [len(entry.tokens) for entry in entries],
        "supervised": [int(entry.is_supervised.sum()) for entry in entries],
        "means": {name: [float(f"{entry.means[name]:.5g}") for entry in entries] for name in names},
    }
    return json_text(facts | {"examples": examples, "chunk": CHUNK})


def json_text(value: Any) -> str:
    """A value as compressed JSON."""
    return compressed(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _chunks(
    entries: Sequence[Entry],
    tokens: list[tuple[int, str]],
    places: NDArray[np.int64],
    facts: dict[str, Any],
) -> list[str]:
    """Chunks: the vocabulary first, then `CHUNK` demonstrations each."""
    texts = json_text({"ids": [each for each, _ in tokens], "texts": [text for _, text in tokens]})
    groups = (entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK))
    return [texts, *(_chunk(group, places, facts) for group in groups)]


def _chunk(group: Sequence[Entry], places: NDArray[np.int64], facts: dict[str, Any]) -> str:
    columns: list[NDArray[Any]] = [
        places[np.concatenate([entry.tokens for entry in group])].astype(np.uint32),
        np.concatenate([entry.is_supervised for entry in group]),
    ]
    columns += [
        np.concatenate([entry.columns[name] for entry in group]) for name, _ in facts["columns"]
    ]
    columns += [
        np.concatenate([entry.others.counts for entry in group]),
        places[np.concatenate([entry.other_tokens for entry in group])].astype(np.uint32),
    ]
    columns += [
        np.concatenate([entry.others.probs[role] for entry in group]) for role in facts["roles"]
    ]
    return packed(columns)
