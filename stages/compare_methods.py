"""`qpipe compare-methods`: the ceiling of every method's targets, in one pass, no folders."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..pipeline.ceiling import Ceiling, ceiling_sums, ceilings, has_ceiling, reproducible_share
from ..pipeline.choice import Choice
from ..pipeline.methods import METHODS, choices
from ..pipeline.targets import Truncation, stored_residual
from .build_targets import check_temperatures, with_statistics
from .inputs import Inputs, open_inputs

WHOLE = Truncation(top_p=1.0, max_support=2**31)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Each method with its ceiling overall and the share of demonstrations it can reproduce."""

    rows: list[tuple[Choice, Ceiling, float]]
    left_out: dict[str, list[str]]  # why, and the methods
    positions: int
    examples: int


def compare_methods(
    scores: Path,
    teacher: Path | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    all_forms: bool = False,
) -> Comparison:
    """Build the targets of every method with its defaults, and keep their ceilings alone."""
    check_temperatures(temperature, teacher_temperature, teacher)
    inputs = open_inputs(scores, teacher, temperature, teacher_temperature)
    usable, left_out = _usable(inputs, all_forms)
    usable = with_statistics(inputs, usable)
    sums = [Counter[str]() for _ in usable]
    for evidence in inputs.all_evidence("compare-methods"):
        for choice, total in zip(usable, sums, strict=True):
            residual = stored_residual(evidence, choice, WHOLE)
            total.update(ceiling_sums(evidence, choice, residual, WHOLE))
    totals = inputs.scores.manifest.totals
    rows = [
        (choice, ceilings(total)[0], reproducible_share(total, totals["rows"]))
        for choice, total in zip(usable, sums, strict=True)
    ]
    return Comparison(rows, left_out, totals["positions"], totals["rows"])


def _usable(inputs: Inputs, all_forms: bool) -> tuple[list[Choice], dict[str, list[str]]]:
    """The choices that can be built, and by what they lack those that cannot."""
    usable: list[Choice] = []
    left_out: dict[str, list[str]] = {}
    for choice in choices():
        name = choice.method.name
        if not all_forms and choice.form != METHODS[name].forms[0]:
            continue
        lacking = inputs.lacking(choice)
        if lacking is None and has_ceiling(choice):
            usable.append(choice)
            continue
        reason = f"needs {lacking[0]}" if lacking else "has no target distribution"
        names = left_out.setdefault(reason, [])
        if name not in names:
            names.append(name)
    return usable, left_out
