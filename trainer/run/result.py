"""The result of a run, and how it is read back from the record of a finished one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError
from ..step.evaluate import Evaluation
from .folder import RUN


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a run; `tokens` and `seconds` are those of its optimizer steps alone."""

    steps: int
    examples: int
    tokens: int  # supervised ones
    seconds: float
    before: Evaluation | None
    after: Evaluation | None
    was_done: bool = False  # by an earlier run: nothing was trained now


def result_from(folder: Path, results: dict[str, Any]) -> TrainResult:
    """The result of an earlier run, from its record. Raises UserError if that is damaged."""
    try:
        evaluations = {
            name: None if results[name] is None else Evaluation(**results[name])
            for name in ("before", "after")
        }
        numbers = {name: value + 0 for name, value in results.items() if name not in evaluations}
        return TrainResult(**{**numbers, **evaluations, "was_done": True})
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / RUN}: damaged, no record of a run: remove {folder}") from error
