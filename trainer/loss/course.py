"""The objective over a run: parameters of a live method that change from step to step.

A folder of a live method holds what the method reads, not its parameters, so these may change as
the model trains: eta of target-sft from the student to the teacher, as TAID has it (arXiv
2501.16937), or beta of jsd.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...pipeline.errors import UserError
from ...pipeline.methods.table import choose, spelled
from .objective import Objective


@dataclass(frozen=True, slots=True)
class Course:
    """An objective, and the parameters at the last step, to which those of the folder go."""

    start: Objective
    ends: Mapping[str, float]

    def at(self, share: float) -> Objective:
        """The objective at a share of the run: 0 is its first step, 1 its last."""
        if not self.ends:
            return self.start
        choice = self.start.choice
        moved = {
            name: (1 - share) * choice.parameters[name] + share * end
            for name, end in self.ends.items()
        }
        return replace(self.start, choice=replace(choice, parameters=choice.parameters | moved))


def course_of(objective: Objective, given: Sequence[str]) -> Course:
    """The course of an objective to the parameters `given`, each NAME=VALUE.

    Raises UserError for a method whose targets are fixed, and for parameters that it does not have.
    """
    if not given:
        return Course(objective, {})
    choice, words = objective.choice, " ".join(given)
    if not choice.reads_student:
        raise UserError(
            f"--param-end {words}: the targets of {choice.method.name} ({choice.form}) are fixed: "
            "build targets of a live form that reads the student, as target-sft --form live"
        )
    ends: dict[str, str] = {}
    for each in given:
        name, _, value = each.partition("=")
        if spelled(name) in ends:
            raise UserError(f"--param-end {words}: {name} is given twice")
        ends[spelled(name)] = value
    ended = choose(choice.method.name, choice.form, ends).parameters
    if any(each.words for each in choice.method.parameters if each.name in ends):
        raise UserError(f"--param-end {words}: give numbers, which can change step by step")
    return Course(objective, {name: float(ended[name]) for name in ends})
