"""Checks the values of decoded rows.

R rows of a batch, T tokens, N supervised positions, K entries of all positions end to end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrow import row_of
from .batches import FlatBatch
from .ragged import segment_sums

MASS_TOLERANCE = 1e-3  # deviation from 1 that an engine's rounding may cause


@dataclass(frozen=True, slots=True)
class Violation:
    """A value that breaks a rule."""

    row: int  # of the batch
    column: str
    what: str


def violations(stage: str, batch: FlatBatch, vocab_size: int) -> Iterator[Violation]:
    """Yield, for each rule that a batch of a stage breaks, the first row that does.

    `decode` has checked the lengths of lists, counts, and the ranges of positions and ids.
    """
    checks = {"score": _of_scores, "build-targets": _of_targets}[stage]
    with np.errstate(all="ignore"):  # NaN is reported as a violation
        found = [_ascent(batch), *checks(batch, vocab_size)]
    for level, column, wrong, what in found:
        if wrong.any():
            yield Violation(row_of(batch.lengths, level, int(np.argmax(wrong))), column, what)


_Check = tuple[str, str, NDArray[np.bool_], str]  # level, column, where it is wrong, message


def _ascent(batch: FlatBatch) -> _Check:
    positions = batch["positions"]
    falls = np.diff(positions, prepend=0) < 1
    is_first = _starts(batch.lengths["position"], len(positions))
    return "position", "positions", falls & ~is_first, "does not ascend"


def _of_scores(batch: FlatBatch, vocab_size: int) -> Iterator[_Check]:
    counts, ids, logs = batch["counts"], batch["topk_ids"], batch["topk_log_probs"]
    tail, observed = batch["tail_mass"], batch["observed_log_probs"]
    repeats = _repeats(ids, counts, vocab_size)
    yield "position", "topk_ids", repeats, "holds an id twice at one position"
    yield "entry", "topk_log_probs", ~(logs <= MASS_TOLERANCE), "is not a log-probability"
    rises = np.diff(logs, prepend=0) > 0
    yield "entry", "topk_log_probs", rises & ~_starts(counts, len(logs)), "does not descend"
    yield "position", "tail_mass", _not_a_share(tail), "is not a share"
    masses = segment_sums(np.exp(logs.astype(np.float64)), counts) + tail
    yield "position", "tail_mass", _is_off(masses, 1), "does not add up to 1 with the entries"
    finite = np.isfinite(observed) & (observed <= MASS_TOLERANCE)
    yield "position", "observed_log_probs", ~finite, "is not a log-probability of a token"
    is_observed = ids == np.repeat(batch.observed_ids, counts)
    apart = is_observed & _is_off(logs, np.repeat(observed, counts))
    yield "entry", "observed_log_probs", apart, "is not that of the same id among the entries"
    ranks = batch["observed_ranks"]
    yield "position", "observed_ranks", (ranks < 1) | (ranks > vocab_size), "is not a rank"
    yield "position", "token_weights", _not_a_weight(batch["token_weights"]), "is not a weight"


def _of_targets(batch: FlatBatch, vocab_size: int) -> Iterator[_Check]:
    counts, ids, probs = batch["counts"], batch["support_ids"], batch["support_probs"]
    repeats = _repeats(ids, counts, vocab_size)
    yield "position", "support_ids", repeats, "holds an id twice at one position"
    is_observed = ids == np.repeat(batch.observed_ids, counts)
    lacks = segment_sums(is_observed.astype(np.int64), counts) == 0
    yield "position", "support_ids", lacks, "lacks the observed token"
    yield "entry", "support_probs", _not_a_share(probs), "is not a share"
    yield "position", "tail_mass", _not_a_share(batch["tail_mass"]), "is not a share"
    masses = segment_sums(probs.astype(np.float64), counts) + batch["tail_mass"]
    yield "position", "tail_mass", _is_off(masses, 1), "does not add up to 1 with the support"
    yield "position", "trust", _not_a_share(batch["trust"]), "is not a share"
    yield "position", "weights", _not_a_weight(batch["weights"]), "is not a weight"


def _starts(lengths: NDArray[np.integer], size: int) -> NDArray[np.bool_]:
    """True at the first value of each list."""
    is_start = np.zeros(size + 1, bool)
    is_start[np.cumsum(lengths) - lengths] = True
    return is_start[:size]


def _repeats(
    ids: NDArray[np.integer], counts: NDArray[np.integer], vocab_size: int
) -> NDArray[np.bool_]:
    """True at positions that have an id more than once."""
    keys = np.sort(np.repeat(np.arange(len(counts)) * vocab_size, counts) + ids)
    repeats = np.zeros(len(counts), bool)
    repeats[keys[1:][keys[1:] == keys[:-1]] // vocab_size] = True
    return repeats


def _not_a_share(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ~((values >= 0) & (values <= 1 + MASS_TOLERANCE))


def _not_a_weight(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ~((values >= 0) & np.isfinite(values))


def _is_off(values: NDArray[Any], wanted: Any) -> NDArray[np.bool_]:
    return ~((np.abs(values - wanted) <= MASS_TOLERANCE) | (values == wanted))
