"""The examples that pass between the stages.

T tokens of an example, N supervised positions, K_n support entries at position n, K = Σ K_n.
Position t is supervised if the loss counts token t, which is predicted from the tokens before it;
position 0 is never supervised. Log-probabilities are natural logarithms (nats) at temperature 1.

Ragged lists are flat: `counts[n]` entries belong to position n, in the order of the positions.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Level = Literal["example", "token", "position", "entry"]
# lists of a value for each token, position or entry, as `schema` makes columns of them
TokenInts = Annotated[Ints, "token", np.int32]
PositionInts = Annotated[Ints, "position", np.int32]
PositionFloats = Annotated[Floats, "position", np.float32]
EntryInts = Annotated[Ints, "entry", np.int32]
EntryFloats = Annotated[Floats, "entry", np.float32]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]  # in JSON


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenised demonstration."""

    id: str
    input_ids: TokenInts  # [T]
    positions: PositionInts  # [N], ascending, each in 1..T-1

    @property
    def observed_ids(self) -> Ints:
        """The supervised tokens, [N]."""
        return self.input_ids[self.positions]


@dataclass(frozen=True, slots=True, eq=False)
class WeightedExample(Example):
    """An example to score, with the token weights of the demonstration."""

    token_weights: Floats  # [N] a factor of the loss; 1 by default


@dataclass(frozen=True, slots=True, eq=False)
class ScoredExample(Example):
    """An example with a model's top-k log-probabilities at each supervised position.

    Entries of further ids that were asked for stand among the top k, ordered by probability.
    """

    observed_log_probs: PositionFloats  # [N] log b(y), also if y is outside the top k
    observed_ranks: PositionInts  # [N] number of tokens at least as probable as y: 1 is the mode
    counts: PositionInts  # [N] entries at each position: the top k and further ids
    topk_ids: EntryInts  # [K] vocabulary ids, most probable first at each position
    topk_log_probs: EntryFloats  # [K] their log b, descending at each position
    tail_mass: PositionFloats  # [N] probability outside the entries
    token_weights: PositionFloats  # [N] as in `WeightedExample`


@dataclass(frozen=True, slots=True, eq=False)
class TargetExample(Example):
    """An example with its target Q = trust·δ_y + (1 − trust)·residual at each position."""

    trust: PositionFloats  # [N] γ in [0, 1]
    counts: PositionInts  # [N] entries of the residual's support, which has the observed token
    support_ids: EntryInts  # [K] vocabulary ids, each once at each position, in any order
    support_probs: EntryFloats  # [K] the residual's probabilities of these ids
    tail_mass: PositionFloats  # [N] the residual's probability outside its support
    weights: PositionFloats  # [N] the factor of each token's loss (s in the table of methods)


class Reject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A demonstration that could not be used, and the reason."""

    source: str  # file or data set
    line: Count  # line (JSON lines) or row (everything else), from 1
    reason: str
