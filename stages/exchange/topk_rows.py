"""Converts rows of tokens and top-k log-probabilities into scored examples.

T tokens of a row, R rows of entries (R is T or T - 1), K entries of all of them concatenated, N
supervised positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.format.ragged import segment_sums
from ...pipeline.format.records import ScoredExample
from ...pipeline.format.row_checks import MASS_TOLERANCE
from ..demonstrations.demonstration import UnusableError
from .settings import Mass

IGNORED = -100  # the label of a token that is not supervised
PADDING = -1e8  # log-probabilities below are padding

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The entries of all rows, concatenated."""

    counts: Ints  # [R]
    ids: Ints  # [K]
    log_probs: Floats  # [K]

    def at(self, rows_N: Ints) -> "TopK":
        """The entries of some rows, given in ascending order."""
        taken = np.zeros(len(self.counts), bool)
        taken[rows_N] = True
        return self.where(np.repeat(taken, self.counts), self.counts[rows_N])

    def where(self, keep_K: NDArray[np.bool_], counts: Ints) -> "TopK":
        """Some of the entries, `counts` of them in each row."""
        return TopK(counts, self.ids[keep_K], self.log_probs[keep_K])

    @property
    def row_of(self) -> Ints:
        """The row that each entry belongs to, [K]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


@dataclass(frozen=True, slots=True, eq=False)
class TopKRow:
    """A row of a file of log-probabilities, parsed but not checked."""

    id: str
    input_ids: Ints  # [T]
    labels: Ints | None  # [T]; None: every token is supervised
    shift: int  # the entries of row r are those of the token at r + shift
    entries: TopK
    scaled: int = 0  # positions whose probabilities added up to more than 1


@dataclass(frozen=True, slots=True)
class ImportRules:
    """How the rows of a file are interpreted.

    The first `top_k` entries of a position are its most probable tokens. `mass` is "model" if the
    probabilities are the model's own, so that the rest of 1 is the tail mass, or "top-k" if they
    are normalised to add up to 1.
    """

    top_k: int
    mass: Mass
    vocab_size: int
    max_length: int


def scored(row: TopKRow, rules: ImportRules) -> tuple[ScoredExample, int]:
    """The row as a scored example, and the number of supervised positions left out.

    A position is left out if its observed token is not among the entries, as its log-probability is
    not in the file. Raises UnusableError for an invalid row, and if no position is left.
    """
    tokens = row.input_ids
    if not 2 <= len(tokens) <= rules.max_length:
        raise UnusableError(f"{len(tokens)} tokens: 2 to {rules.max_length} can be used")
    if ((tokens < 0) | (tokens >= rules.vocab_size)).any():
        raise UnusableError("input_ids: a token is outside of the vocabulary")
    positions = _supervised(row)
    _refuse(len(row.entries.counts) < len(tokens) - row.shift, "fewer rows of entries than tokens")
    entries = _most_probable_first(without_padding(row.entries.at(positions - row.shift)))
    _check(entries, rules)
    is_observed = entries.ids == np.repeat(tokens[positions], entries.counts)
    known = segment_sums(is_observed.astype(np.int64), entries.counts) > 0
    if not known.any():
        raise UnusableError("no supervised token is among the entries of its position")
    left_out = int((~known).sum())
    entries = entries.where(np.repeat(known, entries.counts), entries.counts[known])
    return _example(row.id, tokens, positions[known], entries, rules), left_out


def without_padding(entries: TopK) -> TopK:
    """The entries without padding."""
    is_real = ~(entries.log_probs < PADDING)
    return entries.where(is_real, segment_sums(is_real.astype(np.int64), entries.counts))


def _supervised(row: TopKRow) -> Ints:
    if row.labels is None:
        return np.arange(1, len(row.input_ids))
    if len(row.labels) != len(row.input_ids):
        raise UnusableError("labels: not as many as input_ids")
    supervised = row.labels != IGNORED
    _refuse((row.labels != row.input_ids)[supervised].any(), "labels: other tokens than input_ids")
    positions = np.flatnonzero(supervised)
    positions = positions[positions > 0]  # nothing predicts the first token
    _refuse(len(positions) == 0, "no supervised token")
    return positions


def _most_probable_first(entries: TopK) -> TopK:
    order = np.lexsort((-entries.log_probs, entries.row_of))
    return TopK(entries.counts, entries.ids[order], entries.log_probs[order])


def _check(entries: TopK, rules: ImportRules) -> None:
    _refuse(
        bool((entries.counts < rules.top_k).any()),
        f"a position has fewer than the {rules.top_k} entries of the first: give a lower --top-k",
    )
    ids, logs = entries.ids, entries.log_probs
    _refuse(((ids < 0) | (ids >= rules.vocab_size)).any(), "an id is outside of the vocabulary")
    keys = np.sort(entries.row_of * rules.vocab_size + ids)
    _refuse((np.diff(keys) == 0).any(), "an id stands twice at one position")
    _refuse(not (logs <= MASS_TOLERANCE).all(), "a number is no log-probability")
    masses = segment_sums(np.exp(logs), entries.counts)
    most = float(masses.max(initial=0))
    _refuse(most > 1 + MASS_TOLERANCE, f"probabilities of a position add up to {most:.4g}")
    least = float(masses.min(initial=1))
    if rules.mass == "top-k" and least < 1 - MASS_TOLERANCE:
        raise UnusableError(
            f"probabilities of a position add up to {least:.4g}, not to 1: give --mass model if "
            "they are the model's own"
        )


def _example(
    name: str, tokens: Ints, positions: Ints, entries: TopK, rules: ImportRules
) -> ScoredExample:
    counts, logs = entries.counts, entries.log_probs
    observed_N = logs[entries.ids == np.repeat(tokens[positions], counts)]
    is_ahead = logs >= np.repeat(observed_N, counts)
    tail_N = np.maximum(1 - segment_sums(np.exp(logs), counts), 0)
    return ScoredExample(
        id=name,
        input_ids=tokens.astype(np.int32),
        positions=positions.astype(np.int32),
        observed_log_probs=observed_N.astype(np.float32),
        observed_ranks=segment_sums(is_ahead.astype(np.int64), counts).astype(np.int32),
        counts=counts.astype(np.int32),
        topk_ids=entries.ids.astype(np.int32),
        topk_log_probs=logs.astype(np.float32),
        tail_mass=(tail_N if rules.mass == "model" else np.zeros_like(tail_N)).astype(np.float32),
        token_weights=np.ones(len(positions), np.float32),
    )


def _refuse(is_wrong: Any, reason: str) -> None:
    if is_wrong:
        raise UnusableError(reason)
