"""The day that a chat template writes into the prompt, one and the same in all of a folder."""

from datetime import date
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import MANIFEST, PLAN, read_manifest, read_plan
from .encoder import CLOCK


def template_date(template: str | None, given: str | None, folder: Path | None) -> date | None:
    """What a template takes for today; None where it does not ask.

    Where none is given, the day that the folder was begun with: what goes on after midnight, or on
    another machine, makes the same bytes. Raises UserError where one is given for nothing.
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
    """A day as `--date` gives it."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"--date {text}: no day: give one as in 2026-11-25") from error


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of what a folder holds, sealed or begun."""
    if (folder / MANIFEST).exists():
        return read_manifest(folder).settings
    return read_plan(folder).identity.settings if (folder / PLAN).exists() else {}
