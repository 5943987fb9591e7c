"""Summarises a folder: means and histograms of its measures, and the loss by position.

Sums are over all supervised tokens, a batch at a time.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.folders.manifest import Manifest
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.targets.translation import Mapped, mapped_shares
from .examples import Look
from .measures import MEASURES, Floats

STARTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # of supervised tokens
_BY_POSITION = ("nll", "base-nll")


@dataclass(slots=True)
class Spread:
    """Sum, extremes and histogram of one measure."""

    total: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def is_constant(self) -> bool:
        """Whether all tokens have the same value."""
        return self.high - self.low < 1e-6

    def add(self, name: str, values_N: Floats) -> None:
        """Add the values of some tokens."""
        counted = MEASURES[name].histogram(values_N)
        self.bins = counted if not len(self.bins) else self.bins + counted
        if len(values_N):
            self.total += float(values_N.sum())
            self.low, self.high = (
                min(self.low, float(values_N.min())),
                max(self.high, float(values_N.max())),
            )


@dataclass(slots=True)
class Overview:
    """Sums over examples."""

    examples: int = 0
    positions: int = 0
    spreads: dict[str, Spread] = field(default_factory=dict)
    by_position: dict[str, Floats] = field(default_factory=dict)  # sums of nats by place
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(STARTS), np.int64))

    def add(self, group: Sequence[Look]) -> None:
        """Add some examples."""
        self.examples += len(group)
        self.positions += sum(len(look.positions) for look in group)
        place_N = np.concatenate([np.arange(len(look.positions)) for look in group])
        bin_N = np.searchsorted(STARTS, place_N, side="right") - 1
        self.places += np.bincount(bin_N, minlength=len(STARTS))
        for name in group[0].values:
            values_N = np.concatenate([look.values[name] for look in group])
            self.spreads.setdefault(name, Spread()).add(name, values_N)
            if name in _BY_POSITION:
                sums = self.by_position.setdefault(name, np.zeros(len(STARTS)))
                sums += np.bincount(bin_N, values_N, len(STARTS))

    def mean(self, name: str) -> float:
        """The mean of a measure over all supervised tokens."""
        return self.spreads[name].total / max(self.positions, 1)

    def as_json(self) -> dict[str, Any]:
        """The sums as JSON values."""
        filled = int(np.count_nonzero(self.places))
        return {
            "examples": self.examples,
            "supervised_tokens": self.positions,
            "measures": {name: self._spread_json(name) for name in self.spreads},
            "by_position": {
                "starts": list(STARTS[:filled]),
                "tokens": self.places[:filled].tolist(),
                **{
                    name: (sums[:filled] / self.places[:filled]).tolist()
                    for name, sums in self.by_position.items()
                },
            },
        }

    def _spread_json(self, name: str) -> dict[str, Any]:
        measure, spread = MEASURES[name], self.spreads[name]
        return {
            "title": measure.title,
            "words": measure.words,
            "scale": measure.scale,
            "mean": self.mean(name),
            "lowest": spread.low if self.positions else None,
            "highest": spread.high if self.positions else None,
            "edges": list(measure.edges),
            "labels": list(measure.labels),
            "open": measure.is_open,
            "histogram": spread.bins.tolist(),
        }


def folder_json(folder: SealedFolder) -> dict[str, Any]:
    """The content of a folder's manifest as plain values."""
    manifest = folder.manifest
    totals, settings = manifest.totals, manifest.settings
    shown = ("method", "form", "parameters", "top_k", "top_p", "max_support", "temperature")
    has_tail = manifest.totals["positions"] > 0
    return {
        "path": str(folder.path),
        "stage": folder.stage,
        "fingerprint": manifest.fingerprint,
        "model": manifest.provenance.get("model"),
        "settings": {name: settings[name] for name in shown if settings.get(name) is not None},
        "examples": totals["rows"],
        "rejected": totals["rejected"],
        "tokens": totals["tokens"],
        "supervised_tokens": totals["positions"],
        "mean_support": totals["entries"] / max(totals["positions"], 1),
        "kept_mass": manifest.kept_mass if has_tail else None,
        "bytes_per_token": manifest.bytes_per_token if has_tail else None,
        "mapped": [asdict(each) for each in mapped_of(manifest)],
    }


def mapped_of(manifest: Manifest) -> list[Mapped]:
    """What was mapped of the teachers of a target folder that have another tokenizer."""
    return mapped_shares(manifest.totals["sums"], manifest.totals["positions"])
