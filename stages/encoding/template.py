"""The chat template: loads it, checks its syntax, and fixes the date that it writes."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.errors import UserError, one_line
from ...pipeline.folders.manifest import MANIFEST, PLAN, read_manifest, read_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CLOCK = "strftime_now"  # the function that templates call for the time


def load_template(option: str, tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The chat template for `option`: "tokenizer" (its own), "none", its name, or a Jinja file.

    Raises UserError if it is missing or is not a template.
    """
    if option == "none":
        return None
    if option == "tokenizer":
        return _own_template(tokenizer)
    if option in (named := _named_templates(tokenizer)):
        return named[option]
    return _template_file(Path(option))


def load_tools_template(option: str, tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The template of the tokenizer for conversations with tools, if it has one of its own."""
    return _named_templates(tokenizer).get("tool_use") if option == "tokenizer" else None


def _named_templates(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """The templates of a tokenizer that has several, such as default, tool_use and rag."""
    own = tokenizer.chat_template
    return own if isinstance(own, dict) else {}


def _own_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    named = _named_templates(tokenizer)
    if named and "default" not in named:
        raise UserError(
            f"tokenizer {name_of(tokenizer)} has the templates {', '.join(sorted(named))} and none "
            "of the name default: give one of these names with --template"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"tokenizer {name_of(tokenizer)} has no chat template of its own: "
            "give one with --template FILE, or --template none"
        ) from error


def _template_file(path: Path) -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"template {path}: no such file (--template takes tokenizer, none, the name of one of "
            "the tokenizer's templates, or a Jinja file)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {path}: cannot be read: {one_line(error)}") from error
    _check_syntax(path, template)
    return template


def _check_syntax(path: Path, template: str) -> None:
    from jinja2 import TemplateSyntaxError

    from .sandbox.environment import compiled

    try:
        compiled(template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"template {path}, line {error.lineno}: not a Jinja template: {one_line(error)}"
        ) from error
    except Exception as error:  # of Jinja's compiler, such as RecursionError
        raise UserError(f"template {path}: cannot be compiled: {one_line(error)}") from error


def name_of(tokenizer: "PreTrainedTokenizerFast") -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


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
