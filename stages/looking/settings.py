"""The settings of `qpipe inspect`, each an option."""

from dataclasses import dataclass
from pathlib import Path

from ...pipeline.options import Range, check, option


@dataclass(frozen=True, slots=True)
class InspectSettings:
    """What to look at; `sort` is a word such as lowest-trust, by the mean over an example."""

    folder: Path
    against: Path | None = option(
        None,
        "Second folder of the same demonstrations. Shows where the two differ most.",
        metavar="DIR",
    )
    scores: Path | None = option(
        None, "Base scores of a target folder. Adds base, gain and kl.", metavar="DIR"
    )
    ids: tuple[str, ...] = option(
        (), "Show the examples with these ids.", metavar="ID...", names=("--id",)
    )
    random: int | None = option(None, "Show this many random examples.", range=Range(1))
    seed: int = option(0, "Seed for --random.", range=Range(0))
    sort: str | None = option(
        None,
        "Show the examples with the lowest or highest mean of a measure.",
        metavar="lowest-trust|largest-kl|…",
    )
    examples: int | None = option(
        None, "Number of examples to show.  [default: 3]", range=Range(0), names=("-n",)
    )
    colour_by: str | None = option(
        None,
        "Measure that colours the tokens.  [default: trust if it varies, base for scores, tv for "
        "two folders]",
        metavar="MEASURE",
        names=("--colour-by", "--color-by"),
    )
    model: str | None = option(
        None,
        "Model whose tokenizer decodes the tokens.  [default: the model named in the folder]",
        metavar="DIR",
        names=("--model", "--tokenizer"),
    )

    def __post_init__(self) -> None:
        check(self)
