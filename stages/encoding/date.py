"""The date that a chat template writes into the prompt: one for a whole folder."""

from datetime import date
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import MANIFEST, PLAN, read_manifest, read_plan
from .encoder import CLOCK


def template_date(template: str | None, given: str | None, folder: Path | None) -> date | None:
    """The date passed to a template as today; None if the template does not ask for it.

    Without `given` it is the date the folder was started with, so that a run resumed after midnight
    or on another machine writes the same bytes. Raises UserError for a date that is not used.
    """
    if CLOCK not in (template or ""):
        if given is not None:
            raise UserError(f"--date {given}: the template writes no date: leave it out")
        return None
    begun = None if folder is None else _settings(folder).get("date")
    if given is None and begun is None:
        return date.today()
    return parse_day(str(given or begun))


def parse_day(text: str) -> date:
    """Parse a date as given with `--date`."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"--date {text}: not a date: give one as in 2026-11-25") from error


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder from its manifest or its plan; empty for a new folder."""
    if (folder / MANIFEST).exists():
        return read_manifest(folder).settings
    return read_plan(folder).identity.settings if (folder / PLAN).exists() else {}
