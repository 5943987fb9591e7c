"""The interface of engines, and the scored examples made of their arrays.

Array names end in their shape: N supervised positions, k the size of the top k, V the vocabulary,
G the given ids of all positions, E the entries of all positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.format.ragged import segment_sums
from ...pipeline.format.records import Example, Floats, Ints, ScoredExample, WeightedExample
from ...pipeline.format.row_checks import MASS_TOLERANCE


@dataclass(frozen=True, slots=True, eq=False)
class GivenIds:
    """Ids to score at an example's positions, whatever their rank."""

    counts: Ints  # [N] ids at each position
    ids: Ints  # [G] in the order of the positions

    def below(self, vocab_size: int) -> "GivenIds":
        """The ids below a vocabulary size."""
        has_G = self.ids < vocab_size
        position_G = np.repeat(np.arange(len(self.counts)), self.counts)
        counts_N = np.bincount(position_G[has_G], minlength=len(self.counts))
        return GivenIds(counts_N.astype(np.int32), self.ids[has_G])

    def padded(self) -> NDArray[np.int64]:
        """The ids as [N, w], padded with -1.

        Values at them are flattened again by the mask `padded >= 0`.
        """
        width = int(self.counts.max(initial=0))
        ids_Nw = np.full((len(self.counts), width), -1, np.int64)
        ids_Nw[np.arange(width) < self.counts[:, None]] = self.ids
        return ids_Nw


class Scorer(Protocol):
    """A loaded model that scores examples.

    The log-probabilities are natural, at temperature 1, normalised over the whole vocabulary in
    float32; a rank counts the tokens at least as probable as the observed one, itself included.
    """

    def score(
        self, examples: Sequence[WeightedExample], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Yield each example's index in `examples` and its scores, in any order.

        `at` holds ids for each example, below the vocabulary's size, whose log-probabilities are
        stored in addition to the top k (`with_given`).
        """
        ...


def scored(
    example: WeightedExample,
    observed_log_probs_N: NDArray[np.float32],
    observed_ranks_N: NDArray[np.integer],
    topk_ids_Nk: NDArray[np.integer],
    topk_log_probs_Nk: NDArray[np.float32],
    vocab_size: int,
) -> ScoredExample:
    """Make a scored example of an engine's arrays; the tail mass is 1 minus the top k's mass."""
    if not np.isfinite(observed_log_probs_N).all():
        raise _no_numbers(example)
    N, k = topk_ids_Nk.shape
    counts_N = np.full(N, k, np.int32)
    topk_log_probs = topk_log_probs_Nk.astype(np.float32, copy=False).ravel()
    return ScoredExample(
        id=example.id,
        input_ids=example.input_ids,
        positions=example.positions,
        observed_log_probs=observed_log_probs_N.astype(np.float32, copy=False),
        observed_ranks=observed_ranks_N.astype(np.int32, copy=False),
        counts=counts_N,
        topk_ids=topk_ids_Nk.astype(np.int32, copy=False).ravel(),
        topk_log_probs=topk_log_probs,
        tail_mass=_tail_mass(example, topk_log_probs, counts_N, vocab_size),
        token_weights=example.token_weights,
    )


def with_given(
    example: ScoredExample, given: GivenIds, given_log_probs_G: Floats, vocab_size: int
) -> ScoredExample:
    """Add entries at the given ids to an example, each id once, most probable first.

    Of equally probable entries those of the top k come first, then the given ones in order.
    """
    N = len(example.counts)
    position_E = np.repeat(np.tile(np.arange(N), 2), np.append(example.counts, given.counts))
    ids_E = np.append(example.topk_ids, given.ids)
    log_probs_E = np.append(example.topk_log_probs, given_log_probs_G)
    _, first_E = np.unique(position_E * vocab_size + ids_E, return_index=True)
    first_E.sort()  # an id of both counts as the top k's; the stable sort below keeps this order
    order_E = first_E[np.lexsort((-log_probs_E[first_E], position_E[first_E]))]
    counts_N = np.bincount(position_E[order_E], minlength=N).astype(np.int32)
    return replace(
        example,
        counts=counts_N,
        topk_ids=ids_E[order_E],
        topk_log_probs=log_probs_E[order_E],
        tail_mass=_tail_mass(example, log_probs_E[order_E], counts_N, vocab_size),
    )


def _tail_mass(example: Example, log_probs_E: Floats, counts_N: Ints, vocab_size: int) -> Floats:
    """The mass outside the entries at each position; 0 if they are the whole vocabulary."""
    if np.isnan(log_probs_E).any():
        raise _no_numbers(example)
    kept_mass_N = segment_sums(np.exp(log_probs_E.astype(np.float64)), counts_N)
    tail_mass_N = np.where(counts_N < vocab_size, np.maximum(1 - kept_mass_N, 0), 0)
    return tail_mass_N.astype(np.float32)


def _no_numbers(example: Example) -> UserError:
    return UserError(
        f"example {example.id}: the model returned log-probabilities that are not numbers: its "
        "weights are damaged, or the number format overflows: try --dtype float32"
    )


def contradicts_tail(
    observed_N: NDArray, ranks_N: NDArray, log_probs_Nk: NDArray, vocab_size: int
) -> NDArray[np.bool_]:
    """Whether no tail has the mass that the top k leave.

    With an observed token of rank R > k, at least R - k tokens of the tail are as probable as it,
    and at most R - k - 1 more so, but none more than the last of the top k. Otherwise no token is.
    """
    top_k = log_probs_Nk.shape[1]
    probs_Nk = np.exp(log_probs_Nk.astype(np.float64))
    tail_N, last_N = 1 - probs_Nk.sum(axis=1), probs_Nk[:, -1]
    observed_prob_N = np.exp(observed_N.astype(np.float64))
    before_N = ranks_N - top_k - 1  # tokens of the tail that are more probable
    least_N = (before_N + 1) * observed_prob_N
    most_N = before_N * last_N + (vocab_size - ranks_N + 1) * observed_prob_N
    is_inside_N = ranks_N <= top_k
    least_N = np.where(is_inside_N, 0, least_N)
    most_N = np.where(is_inside_N, (vocab_size - top_k) * last_N, most_N)
    return (tail_N < least_N - MASS_TOLERANCE) | (tail_N > most_N + MASS_TOLERANCE)


def shared_beginning(some: Ints, others: Ints) -> int:
    """The number of tokens with which both begin."""
    length = min(len(some), len(others))
    differ = some[:length] != others[:length]
    return int(differ.argmax()) if differ.any() else length
