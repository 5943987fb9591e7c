"""What holds of every row of a shard, whoever made it.

R rows of a batch, T tokens, N supervised positions, K entries of all of them end to end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import FlatBatch
from .ragged import segment_sums

MASS_TOLERANCE = 1e-3  # what an engine's own rounding may take from 1, or add to it


@dataclass(frozen=True, slots=True)
class Violation:
    """A value that cannot be right."""

    row: int  # of the batch
    column: str
    what: str


def violations(stage: str, batch: FlatBatch, vocab_size: int) -> Iterator[Violation]:
    """What is wrong with a batch of a stage's records, for each rule its first row.

    The lists agree in length already, counts add up and positions lie in their rows: `decode` sees
    to that.
    """
    checks = {"score": _of_scores, "build-targets": _of_targets}[stage]
    for level, column, wrong, what in (*_of_all(batch, vocab_size), *checks(batch, vocab_size)):
        if wrong.any():
            ends = np.cumsum(batch.lengths[level])
            yield Violation(int(np.searchsorted(ends, np.argmax(wrong), "right")), column, what)


_Check = tuple[str, str, NDArray[np.bool_], str]  # level, column, where it is wrong, in words


def _of_all(batch: FlatBatch, vocab_size: int) -> Iterator[_Check]:
    tokens, positions = batch["input_ids"], batch["positions"]
    yield "token", "input_ids", _outside(tokens, vocab_size), "is outside of the vocabulary"
    falls = np.diff(positions, prepend=0) < 1
    is_first = _starts(batch.lengths["position"], len(positions))
    yield "position", "positions", falls & ~is_first, "does not ascend"


def _of_scores(batch: FlatBatch, vocab_size: int) -> Iterator[_Check]:
    counts, ids, logs = batch["counts"], batch["topk_ids"], batch["topk_log_probs"]
    tail, observed = batch["tail_mass"], batch["observed_log_probs"]
    yield "entry", "topk_ids", _outside(ids, vocab_size), "is outside of the vocabulary"
    yield "entry", "topk_ids", _repeats(ids, counts), "holds an id twice at one position"
    yield "entry", "topk_log_probs", ~(logs <= MASS_TOLERANCE), "is no log-probability"
    rises = np.diff(logs, prepend=0) > 0
    yield "entry", "topk_log_probs", rises & ~_starts(counts, len(logs)), "does not descend"
    yield "position", "tail_mass", _no_share(tail), "is no share"
    masses = segment_sums(np.exp(logs.astype(np.float64)), counts) + tail
    yield "position", "tail_mass", _is_off(masses, 1), "does not add up to 1 with the entries"
    finite = np.isfinite(observed) & (observed <= MASS_TOLERANCE)
    yield "position", "observed_log_probs", ~finite, "is no log-probability of a token"
    is_observed = ids == np.repeat(batch.observed_ids, counts)
    apart = is_observed & _is_off(logs, np.repeat(observed, counts))
    yield "entry", "observed_log_probs", apart, "is not that of the same id among the entries"
    ranks = batch["observed_ranks"]
    yield "position", "observed_ranks", (ranks < 1) | (ranks > vocab_size), "is no rank"
    yield "position", "token_weights", _no_weight(batch["token_weights"]), "is no weight"


def _of_targets(batch: FlatBatch, vocab_size: int) -> Iterator[_Check]:
    counts, ids, probs = batch["counts"], batch["support_ids"], batch["support_probs"]
    yield "entry", "support_ids", _outside(ids, vocab_size), "is outside of the vocabulary"
    yield "entry", "support_ids", _repeats(ids, counts), "holds an id twice at one position"
    is_observed = ids == np.repeat(batch.observed_ids, counts)
    lacks = segment_sums(is_observed.astype(np.int64), counts) == 0
    yield "position", "support_ids", lacks, "lacks the observed token"
    yield "entry", "support_probs", _no_share(probs), "is no share"
    yield "position", "tail_mass", _no_share(batch["tail_mass"]), "is no share"
    masses = segment_sums(probs.astype(np.float64), counts) + batch["tail_mass"]
    yield "position", "tail_mass", _is_off(masses, 1), "does not add up to 1 with the support"
    yield "position", "trust", _no_share(batch["trust"]), "is no share"
    yield "position", "weights", _no_weight(batch["weights"]), "is no weight"


def _outside(ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.bool_]:
    return (ids < 0) | (ids >= vocab_size)


def _starts(lengths: NDArray[np.integer], size: int) -> NDArray[np.bool_]:
    """Where the lists of these lengths begin."""
    is_start = np.zeros(size + 1, bool)
    is_start[np.cumsum(lengths) - lengths] = True
    return is_start[:size]


def _repeats(ids: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Where an id stands that stood at the same position before."""
    positions = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((ids, positions))
    same = (np.diff(ids[order], prepend=-1) == 0) & (np.diff(positions[order], prepend=-1) == 0)
    repeats = np.zeros(len(ids), bool)
    repeats[order] = same
    return repeats


def _no_share(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ~((values >= 0) & (values <= 1 + MASS_TOLERANCE))


def _no_weight(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ~((values >= 0) & np.isfinite(values))


def _is_off(values: NDArray[Any], wanted: Any) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return ~((np.abs(values - wanted) <= MASS_TOLERANCE) | (values == wanted))
