"""The settings of `qpipe subset`, each an option."""

from dataclasses import dataclass, field
from pathlib import Path

from ...pipeline.errors import UserError
from ...pipeline.options import about, option


@dataclass(frozen=True, slots=True)
class SubsetSettings:
    """The options of `qpipe subset`: a row stays if its id is listed and every condition holds."""

    folder: Path
    out: Path = field(metadata=about("Output folder."))
    ids: Path | None = option(
        None, "File of demonstration ids to select, one per line.", metavar="FILE"
    )
    where: tuple[str, ...] = option(
        (),
        "Select demonstrations for which this condition is true, for example 'mean_nll < 2.5'. Of "
        "several conditions, all must be true.",
        metavar="CONDITION...",
    )

    def __post_init__(self) -> None:
        if self.ids is None and not self.where:
            raise UserError("no rows are selected: give --ids FILE, or --where 'NAME < NUMBER'")
