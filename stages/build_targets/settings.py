"""The settings of `qpipe build-targets`, each an option."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...pipeline.errors import UserError, require
from ...pipeline.options import Range, about, check, option

if TYPE_CHECKING:
    from ...pipeline.methods.definition import Choice


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
    teacher: Path | None = option(
        None,
        "Scores of the same examples under a teacher model, made by `qpipe score --at`.",
        metavar="DIR",
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
        if self.teacher is not None and not self.choice.needs_teacher:
            raise UserError(
                f"--teacher {self.teacher}: {self.choice.method.name} does not use a teacher: "
                "leave it out, or give another --method"
            )


def check_temperatures(base: float, teacher: float, folder: Path | None) -> None:
    """Raise UserError for values out of range, or a teacher's temperature without a teacher."""
    for name, value in (("--temperature", base), ("--teacher-temperature", teacher)):
        require(0.05 <= value <= 20, name, value, "0.05 to 20")
    if folder is None and teacher != 1:
        raise UserError(f"--teacher-temperature {teacher:g} goes with --teacher: give that as well")
