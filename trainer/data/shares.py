"""Mixture weights as whole numbers."""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

from ...pipeline.errors import UserError

LONGEST_PERIOD = 1_000_000  # samples until the pattern repeats: it is worked out when opened


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in exact proportion to the weights, as these are written."""
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"weights {_words(weights)}: give each folder a weight above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(weight * lcm(*(each.denominator for each in exact))) for weight in exact]
    shares = tuple(weight // gcd(*whole) for weight in whole)
    if sum(shares) > LONGEST_PERIOD:
        raise UserError(
            f"weights {_words(weights)}: only repeat after {sum(shares):,} samples: give rounder "
            f"ones, {LONGEST_PERIOD:,} is the most"
        )
    return shares


def _words(weights: Sequence[float]) -> str:
    return ", ".join(map(str, weights))
