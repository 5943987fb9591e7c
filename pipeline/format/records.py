"""What travels between the stages, one demonstration at a time.

T tokens in an example, N supervised positions, K_n support entries at position n, K = Σ K_n.
Position t is supervised when token t counts in the loss; it is predicted from the tokens before it,
so position 0 never is. Log-probabilities are natural logarithms (nats) at temperature 1.

Ragged lists are flat: `counts[n]` entries belong to position n, in the order of the positions.
"""

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]  # in JSON


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenised demonstration."""

    id: str
    input_ids: Ints  # [T]
    positions: Ints  # [N], ascending, each in 1..T-1

    @property
    def observed_ids(self) -> Ints:
        """The supervised tokens themselves, [N]."""
        return self.input_ids[self.positions]


@dataclass(frozen=True, slots=True, eq=False)
class WeightedExample(Example):
    """An example to score, with the weights that came with the demonstration."""

    token_weights: Floats  # [N] a factor of the loss; 1 where none was given


@dataclass(frozen=True, slots=True, eq=False)
class ScoredExample(Example):
    """An example under a frozen model: its top-k log-probabilities at each supervised position.

    Entries gathered at given ids stand among the top k, in the order of their probability.
    """

    observed_log_probs: Floats  # [N] log b(y), also where y is outside the top k
    observed_ranks: Ints  # [N] tokens at least as probable as y, y included: 1 is the mode
    counts: Ints  # [N] entries at each position: the top k, and what was gathered besides
    topk_ids: Ints  # [K] vocabulary ids, most probable first at each position
    topk_log_probs: Floats  # [K] their log b, descending at each position
    tail_mass: Floats  # [N] probability outside the entries
    token_weights: Floats  # [N] as in `WeightedExample`


@dataclass(frozen=True, slots=True, eq=False)
class TargetExample(Example):
    """An example with its target Q = trust·δ_y + (1 − trust)·residual at each position."""

    trust: Floats  # [N] γ in [0, 1]
    counts: Ints  # [N] entries of the residual's support, the observed token always among them
    support_ids: Ints  # [K] vocabulary ids, each once at each position, in any order
    support_probs: Floats  # [K] the residual's probabilities at them
    tail_mass: Floats  # [N] the residual's probability outside its support
    weights: Floats  # [N] the per-token factor of the loss (s in the table of methods)


class Reject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A demonstration that could not be used, and why."""

    source: str  # file or data set
    line: Count  # line (JSON lines) or row (everything else), from 1
    reason: str
