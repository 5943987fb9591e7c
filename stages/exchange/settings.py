"""The settings of `qpipe import` and `qpipe export`, each an option."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...pipeline.options import Range, about, check, option

Format = Literal["axolotl", "distillkit", "megatron"]
Mass = Literal["model", "top-k"]
ExportFormat = Literal["axolotl", "megatron", "veomni"]


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """The options of `qpipe import`."""

    file: Path
    format: Format = field(metadata=about("Format of the file."))
    model: str = field(metadata=about("Model that computed the log-probabilities."))
    out: Path = field(metadata=about("Output folder."))
    mass: Mass | None = option(
        None,
        "Meaning of the probabilities at a position: the model's own, where the rest is tail mass, "
        "or normalized to 1 over the top k.  [default: top-k for axolotl, model for the others]",
    )
    codec: Path | None = option(
        None,
        "DistillKit's settings of packed log-probabilities.  [default: compression_config.yaml "
        "beside the file]",
        metavar="FILE",
    )
    logits: Path | None = option(
        None, "Folder of Megatron-LM's tars; the file holds the tokens of their samples, in order."
    )
    top_k: int | None = option(
        None,
        "Number of entries of a position that are certain to be its most probable ones.  [default: "
        "the number of entries at the first position]",
        range=Range(1),
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """The options of `qpipe export`."""

    scores: Path
    out: Path = field(metadata=about("Parquet file to write."))
    mass: Mass = option(
        "top-k", "Normalize the probabilities of a position to 1, or keep the model's own."
    )
    format: ExportFormat = option("axolotl", "Format of the file; megatron makes a folder.")
    sequence_length: int | None = option(
        None, "Rows of a sample of megatron: the student's --seq-length.", range=Range(1)
    )

    def __post_init__(self) -> None:
        check(self)
