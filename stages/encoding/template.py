"""Loads a chat template and checks its syntax."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...pipeline.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_template(option: str, tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The chat template for `option`: "tokenizer" (its own), "none", or a Jinja file.

    Raises UserError if it is missing or is not a template.
    """
    if option == "none":
        return None
    if option == "tokenizer":
        return _own_template(tokenizer)
    return _template_file(Path(option), tokenizer)


def _own_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"tokenizer {name_of(tokenizer)} has no chat template of its own: "
            "give one with --template FILE, or --template none"
        ) from error


def _template_file(path: Path, tokenizer: "PreTrainedTokenizerFast") -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"template {path}: no such file (--template takes tokenizer, none, or a Jinja file)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {path}: cannot be read: {one_line(error)}") from error
    _check_syntax(path, template, tokenizer)
    return template


def _check_syntax(path: Path, template: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    from jinja2 import TemplateSyntaxError

    question = [{"role": "user", "content": "?"}]
    try:
        tokenizer.apply_chat_template(question, chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"template {path}, line {error.lineno}: not a Jinja template: {one_line(error)}"
        ) from error
    except Exception:  # it compiles, but may refuse a conversation of one question
        return


def name_of(tokenizer: "PreTrainedTokenizerFast") -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
