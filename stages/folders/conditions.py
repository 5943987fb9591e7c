"""Conditions on the rows of a folder, such as "mean_nll < 2.5".

R rows of a batch.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.format.batches import FlatBatch
from ...pipeline.format.ragged import segment_sums

OPERATORS: dict[str, Callable[[NDArray, float], NDArray]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_COMMON = {
    "tokens": lambda batch: batch.lengths["token"],
    "supervised_tokens": lambda batch: batch.lengths["position"],
    "mean_tail_mass": lambda batch: _means(batch, "tail_mass"),
}
_OF_STAGE: dict[str, dict[str, Callable[[FlatBatch], NDArray]]] = {
    "score": _COMMON
    | {
        "mean_nll": lambda batch: -_means(batch, "observed_log_probs"),
        "mean_weight": lambda batch: _means(batch, "token_weights"),
    },
    "build-targets": _COMMON
    | {
        "mean_trust": lambda batch: _means(batch, "trust"),
        "mean_weight": lambda batch: _means(batch, "weights"),
    },
}


@dataclass(frozen=True, slots=True, order=True)
class Condition:
    """A statistic of a row, compared with a number; false of a mean over no positions."""

    name: str
    operator: str
    number: float

    def holds(self, stage: str, batch: FlatBatch) -> NDArray[np.bool_]:
        """Where it holds, [R]."""
        values = _OF_STAGE[stage][self.name](batch).astype(np.float64)
        return OPERATORS[self.operator](values, self.number) & ~np.isnan(values)


def parse_condition(text: str, stage: str) -> Condition:
    """The condition in a text, as in `mean_nll < 2.5`.

    Raises UserError for another text, and for a statistic that folders of the stage have not.
    """
    match = re.fullmatch(r"\s*(\w+)\s*([<>]=?|[=!]=)\s*(\S+)\s*", text)
    try:
        number = float(match[3]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise UserError(
            f"--where {text!r} is no condition: give a statistic, one of {' '.join(OPERATORS)} and "
            "a number, as in 'mean_nll < 2.5'"
        )
    known = _OF_STAGE[stage]
    if match[1] not in known:
        raise UserError(
            f"--where {text!r}: a folder made by `qpipe {stage}` has no {match[1]}: give one of "
            f"{', '.join(known)}"
        )
    return Condition(match[1], match[2], number)


def _means(batch: FlatBatch, name: str) -> NDArray[np.float64]:
    counts = batch.lengths["position"]
    sums = segment_sums(batch[name].astype(np.float64), counts)
    with np.errstate(invalid="ignore"):
        return sums / counts
