"""Which values of a parameter `make test` leaves to `make faults`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """These values of a parameter, or tuples of several parameters, for `make faults` alone."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


# They differ in kind: in what is stored, in which models they read, and in the loss.
KINDS = (
    ("sft", "frozen-target"),
    ("sft+kl", "frozen-target"),
    ("dft", "live"),
    ("target-sft", "live"),
    ("iw-sft", "live"),
    ("gem", "live"),
)
KIND_NAMES = tuple(name for name, _ in KINDS)


def of_six_kinds(cases: Iterable[Any], kind: Callable[[Any], tuple[str, str]]) -> list[Any]:
    """All the cases; those of methods and forms other than `KINDS` for `make faults` alone.

    For what is the same code for every method. What is arithmetic is tested of each.
    """
    return [each for case in cases for each in ([case] if kind(case) in KINDS else slow(case))]


def names_of_six_kinds(names: Iterable[str]) -> list[Any]:
    """The same of methods without their forms."""
    return [each for name in names for each in ([name] if name in KIND_NAMES else slow(name))]
