"""Rejects demonstrations on which a template takes too much; after some it is the template."""

from ....pipeline.errors import UserError
from ....pipeline.format.records import Reject
from ...demonstrations.demonstration import Demonstration
from .watch import TooMuchError

_MOST = 3  # demonstrations that take too much; then it is the template


class Overruns:
    """Counts the demonstrations on which a template, named by `what`, took too much."""

    def __init__(self, what: str, way_out: str) -> None:
        self._what, self._way_out = what, way_out
        self._count = 0

    def reject(self, demonstration: Demonstration, error: TooMuchError) -> Reject:
        """The demonstration as a reject. Raises UserError for the last one that is allowed."""
        self._count += 1
        source, line = demonstration.source, demonstration.line
        if self._count == _MOST:
            raise UserError(
                f"{self._what} cannot be used: {error}, also for {source}, line {line}: "
                f"{self._way_out}"
            ) from error
        return Reject(source, line, f"{self._what} cannot be used on this row: {error}")
