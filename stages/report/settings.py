"""The settings of the page that `qpipe report` makes of a folder, each an option."""

from dataclasses import dataclass
from pathlib import Path

from ...pipeline.options import Range, check, option


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """What to put on a page; `max_megabytes` is of the file."""

    folder: Path
    scores: Path | None = option(
        None,
        "Base scores of a target folder. Shows the base, and what the target adds to it.",
        metavar="DIR",
    )
    teacher: Path | None = option(None, "Teacher scores of the same demonstrations.", metavar="DIR")
    model: str | None = option(
        None,
        "Model whose tokenizer decodes the tokens.  [default: the model named in the folder]",
        metavar="DIR",
        names=("--model", "--tokenizer"),
    )
    examples: int = option(
        5000,
        "Maximum number of demonstrations on the page; a sample is drawn from more.",
        range=Range(1),
    )
    alternatives: int = option(
        5,
        "Number of most probable tokens of each distribution to store per position, at most 8.",
        range=Range(0, 8),
        metavar="K",
    )
    max_megabytes: float = option(
        25.0,
        "Maximum size of the file. Fewer demonstrations are shown if they do not fit.",
        range=Range(0.1, below=True),
    )
    seed: int = option(0, "Seed for the sample.", range=Range(0))

    def __post_init__(self) -> None:
        check(self)
