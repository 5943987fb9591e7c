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
    can_teach,
    ceiling_sums,
    ceilings,
    has_ceiling,
    reproducible_share,
)
from ...pipeline.targets.translation import Mapped, mapped_shares
from .inputs import Inputs, open_inputs
from .settings import Mean, by_column_of, check_temperatures, pooling_of
from .stage import with_statistics

WHOLE = Truncation(top_p=1.0, max_support=2**31)


Row = tuple[Choice, Ceiling, float]  # the last is the share of demonstrations it can reproduce


@dataclass(frozen=True, slots=True)
class Comparison:
    """Each method with its ceiling overall and the share of demonstrations it can reproduce."""

    rows: list[Row]
    left_out: dict[str, list[str]]  # by the reason
    positions: int
    examples: int
    mapped: list[Mapped] = field(default_factory=list)  # of teachers with another tokenizer


def compare_methods(
    scores: Path,
    teacher: Sequence[Path] = (),
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    all_forms: bool = False,
    teacher_weights: str | None = None,
    teacher_mean: Mean = "arithmetic",
    tokenizer: Sequence[str] = (),
    teacher_column: str | None = None,
    teacher_values: str | None = None,
    demonstrations: tuple[str, ...] = (),
) -> Comparison:
    """Build the targets of every method with its defaults, and keep only their ceilings."""
    check_temperatures(temperature, teacher_temperature, teacher)
    by_column = by_column_of(len(teacher), teacher_column, teacher_values, demonstrations)
    averaged = 0 if by_column else len(teacher)
    pooling = pooling_of(averaged, teacher_weights, teacher_mean, teacher_temperature)
    inputs = open_inputs(
        scores, teacher, temperature, teacher_temperature, pooling, tokenizer, by_column
    )
    left_out = LeftOut()
    usable = with_statistics(inputs, _usable(inputs, all_forms, left_out), left_out.add)
    sums: dict[int, Counter[str]] = {place: Counter() for place in range(len(usable))}
    mapped: Counter[str] = Counter()
    for evidence in inputs.all_evidence("compare-methods"):
        mapped.update(evidence.mapped_sums())
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
    shares = mapped_shares(mapped, totals["positions"])
    return Comparison(rows, left_out.methods, totals["positions"], totals["rows"], shares)


def ranked(rows: Sequence[Row]) -> list[Row]:
    """First what can teach most of the demonstrations, those with the least KL from the base first.

    Then the rest, those that reproduce most demonstrations and have the least NLL first.
    """

    def rank(row: Row) -> tuple[float, ...]:
        _, ceiling, share = row
        if can_teach(ceiling, share):
            return (0, ceiling.divergence)
        return (1, -share, ceiling.nll)

    return sorted(rows, key=rank)


def advice(rows: Sequence[Row]) -> str:
    """What follows from the ceilings, in a sentence or two."""
    able = [row for row in ranked(rows) if can_teach(*row[1:])]
    weak = len(rows) - len(able)
    if not able:
        return (
            "no method here can teach half of the demonstrations: take one whose γ is above 0.5 "
            "at every token, as sft+kl with a lam below 1"
        )
    first, ceiling, share = able[0]
    words = (
        f"of the {len(able)} that can teach most demonstrations, {first.method.name} "
        f"({first.form}) stays nearest to the base, {ceiling.divergence:.2g} nats a token, and "
        f"can teach {share:.0%} of them"
    )
    if weak:
        words += f"; the last {weak} cannot teach half of them"
    if any(choice.needs_teacher and choice.residual == "teacher" for choice, *_ in rows):
        words += ". The ceiling does not tell whether the teacher or the demonstrations are right"
    return words


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
