"""Which values of a parameter `make test` leaves to `make faults`."""

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """These values of a parameter, or tuples of several parameters, for `make faults` alone."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
