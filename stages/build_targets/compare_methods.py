"""`qpipe compare-methods`: the ceiling of every method's targets, without making folders.

One pass over the scores, and one before it for the methods that read a statistic of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...pipeline.errors import UserError
from ...pipeline.methods.definition import Choice
from ...pipeline.methods.table import METHODS, choices
from ...pipeline.targets.build import Truncation, stored_residual
from ...pipeline.targets.ceiling import (
    Ceiling,
    ceiling_sums,
    ceilings,
    has_ceiling,
    reproducible_share,
)
from .inputs import Inputs, open_inputs
from .settings import Mean, check_temperatures, pooling_of
from .stage import with_statistics

WHOLE = Truncation(top_p=1.0, max_support=2**31)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Each method with its ceiling overall and the share of demonstrations it can reproduce."""

    rows: list[tuple[Choice, Ceiling, float]]
    left_out: dict[str, list[str]]  # by the reason
    positions: int
    examples: int


def compare_methods(
    scores: Path,
    teacher: Sequence[Path] = (),
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    all_forms: bool = False,
    teacher_weights: str | None = None,
    teacher_mean: Mean = "arithmetic",
) -> Comparison:
    """Build the targets of every method with its defaults, and keep only their ceilings."""
    check_temperatures(temperature, teacher_temperature, teacher)
    pooling = pooling_of(len(teacher), teacher_weights, teacher_mean, teacher_temperature)
    inputs = open_inputs(scores, teacher, temperature, teacher_temperature, pooling)
    left_out = LeftOut()
    usable = with_statistics(inputs, _usable(inputs, all_forms, left_out), left_out.add)
    sums: dict[int, Counter[str]] = {place: Counter() for place in range(len(usable))}
    for evidence in inputs.all_evidence("compare-methods"):
        for place in list(sums):
            choice = usable[place]
            try:
                residual = stored_residual(evidence, choice, WHOLE)
                sums[place].update(ceiling_sums(evidence, choice, residual))
            except UserError as error:
                del sums[place]
                left_out.add(choice, str(error))
    totals = inputs.scores.manifest.totals
    rows = [
        (usable[place], ceilings(total)[0], reproducible_share(total, totals["rows"]))
        for place, total in sums.items()
    ]
    return Comparison(rows, left_out.methods, totals["positions"], totals["rows"])


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The methods left out, by the reason."""

    methods: dict[str, list[str]] = field(default_factory=dict)

    def add(self, choice: Choice, reason: str) -> None:
        """Leave a method out."""
        names = self.methods.setdefault(reason, [])
        if choice.method.name not in names:
            names.append(choice.method.name)


def _usable(inputs: Inputs, all_forms: bool, left_out: LeftOut) -> list[Choice]:
    """The choices that can be built and compared."""
    usable: list[Choice] = []
    for choice in choices():
        if not all_forms and choice.form != METHODS[choice.method.name].forms[0]:
            continue
        lacking = inputs.lacking(choice)
        if lacking is not None:
            left_out.add(choice, f"needs {lacking[0]}")
        elif not has_ceiling(choice, inputs.base_model):
            left_out.add(choice, "its target is not known")
        else:
            usable.append(choice)
    return usable
