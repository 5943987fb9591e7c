"""The settings of `qpipe build-targets`, each an option."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...pipeline.errors import UserError, require
from ...pipeline.options import Range, about, check, option

if TYPE_CHECKING:
    from ...pipeline.methods.definition import Choice
    from ...pipeline.targets.pooling import Pooling
    from .teacher_by_column import ByColumn

Mean = Literal["arithmetic", "geometric"]


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """The scores, the method, and what is stored of its targets.

    The stored support of a residual is the shortest prefix of its known entries, most probable
    first, that holds `top_p` of the probability, at most `max_support` entries, and the observed
    token. `precision` is that of the log-probabilities; other values are stored in float32. With
    `in_store`, `out` is a store, in which the folder is named by its fingerprint.
    """

    scores: Path = field(metadata=about("Score folder made by `qpipe score`."))
    out: Path
    choice: "Choice"
    teacher: tuple[Path, ...] = option(
        (),
        "Scores of the same examples under a teacher model, made by `qpipe score --at`. Several "
        "teachers are averaged, or chosen by --teacher-column.",
        metavar="DIR...",
    )
    tokenizer: tuple[str, ...] = option(
        (),
        "Models of the base and of a teacher with another tokenizer, folders or names on the hub: "
        "its tokens are mapped by their text.",
        metavar="MODEL...",
    )
    teacher_weights: str | None = option(
        None,
        "Weights of several teachers in their mean, in order, as in 2,1.  [default: equal]",
        metavar="W,W,...",
    )
    teacher_mean: Mean = option(
        "arithmetic", "Mean of several teachers: of their probabilities, or of the logs of these."
    )
    teacher_column: str | None = option(
        None,
        "Field of the demonstrations whose value names the teacher of each row.",
        metavar="FIELD",
    )
    teacher_values: str | None = option(
        None,
        "Values of --teacher-column, one for each teacher in order, as in code,math.",
        metavar="V,V,...",
    )
    demonstrations: tuple[str, ...] = option(
        (), "The scored demonstrations, to read --teacher-column from.", metavar="FILE..."
    )
    in_store: bool = False
    temperature: float = option(1.0, "Temperature applied to the base distribution.")
    teacher_temperature: float = option(1.0, "Temperature applied to the teacher distribution.")
    top_p: float = option(
        0.99,
        "Minimum probability of the stored support, as far as the top k of the scores reach.",
        range=Range(0, 1, above=True),
    )
    max_support: int = option(
        64,
        "Maximum number of entries of the support, not counting the observed token.",
        range=Range(1),
    )
    precision: Literal["uint8", "float16", "float32"] = option(
        "uint8",
        "Precision of the stored log-probabilities. With uint8, probabilities above 1e-6 "
        "are off by at most 16 %.",
    )

    def __post_init__(self) -> None:
        check(self)
        check_temperatures(self.temperature, self.teacher_temperature, self.teacher)
        _ = self.pooling, self.by_column
        if self.teacher and not self.choice.needs_teacher:
            raise UserError(
                f"--teacher {self.teacher[0]}: {self.choice.method.name} does not use a teacher: "
                "leave it out, or give another --method"
            )

    @property
    def by_column(self) -> "ByColumn | None":
        """The choice of a teacher by a column; None without one."""
        return by_column_of(
            len(self.teacher), self.teacher_column, self.teacher_values, self.demonstrations
        )

    @property
    def pooling(self) -> "Pooling | None":
        """The mean of several teachers; None of one or none."""
        averaged = 0 if self.teacher_column is not None else len(self.teacher)
        return pooling_of(
            averaged, self.teacher_weights, self.teacher_mean, self.teacher_temperature
        )


def by_column_of(
    teachers: int, column: str | None, values: str | None, demonstrations: tuple[str, ...]
) -> "ByColumn | None":
    """The choice of a teacher by a column; None without one.

    Raises UserError for an option that lacks the others, and for values that are not as many
    different ones as teachers.
    """
    if column is None or values is None or not demonstrations:
        if column is None and values is None and not demonstrations:
            return None
        raise UserError(
            "--teacher-column, --teacher-values and --demonstrations go together: give all, or none"
        )
    if teachers < 2:
        raise UserError("--teacher-column goes with several teachers: give another --teacher")
    names = tuple(values.split(","))
    if len(names) != teachers or len(set(names)) != teachers:
        raise UserError(
            f"--teacher-values {values}: give {teachers} different values of {column}, one for "
            "each --teacher in order, as in code,math"
        )
    from .teacher_by_column import ByColumn  # here, as it loads numpy

    return ByColumn(column, names, demonstrations)


def pooling_of(
    teachers: int, weights: str | None, mean: Mean, temperature: float = 1.0
) -> "Pooling | None":
    """The mean of several teachers; None of one or none.

    Raises UserError for weights that are not as many positive numbers as teachers, and where there
    is nothing to average.
    """
    if teachers < 2:
        if weights is not None or mean != "arithmetic":
            raise UserError(
                "--teacher-weights and --teacher-mean go with several teachers: give another "
                "--teacher, or leave them out"
            )
        return None
    if mean == "geometric" and temperature != 1:
        raise UserError(
            f"--teacher-temperature {temperature:g} goes with --teacher-mean arithmetic: give that"
        )
    try:
        numbers = [1.0] * teachers if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != teachers or not all(0 < number < inf for number in numbers):
        raise UserError(
            f"--teacher-weights {weights}: give {teachers} numbers above 0, one for each teacher, "
            f"as in {','.join('1' * teachers)}"
        )
    from ...pipeline.targets.pooling import Pooling  # here, as it loads numpy

    return Pooling(tuple(number / sum(numbers) for number in numbers), mean)


def check_temperatures(base: float, teacher: float, folders: Sequence[Path]) -> None:
    """Raise UserError for values out of range, or a teacher's temperature without a teacher."""
    for name, value in (("--temperature", base), ("--teacher-temperature", teacher)):
        require(0.05 <= value <= 20, name, value, "0.05 to 20")
    if not folders and teacher != 1:
        raise UserError(f"--teacher-temperature {teacher:g} goes with --teacher: give that as well")
