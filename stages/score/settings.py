"""The settings of `qpipe score`, each an option."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...pipeline.errors import UserError
from ...pipeline.options import Range, about, check, option
from ..engines.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """Which rows of text are scored, and how they become examples."""

    demonstrations: tuple[str, ...] = option(
        (),
        "JSON lines (also .gz, .zst), parquet, Arrow, or a Hugging Face data set name or folder.",
        metavar="FILE...",
    )
    max_length: int | None = option(
        None,
        "Longest demonstration.  [default: the model's limit, at most 4096]",
        range=Range(2),
        metavar="TOKENS",
    )
    too_long: Literal["reject", "cut"] = option(
        "reject", "What happens to a longer one; either is counted."
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion"] = option(
        "auto", "What a row looks like; auto recognises it row by row."
    )
    template: str = option(
        "tokenizer",
        "Chat template: the tokenizer's own, none, or a Jinja file.",
        metavar="tokenizer|none|FILE",
    )
    date: str | None = option(
        None,
        "What a template that writes today's date takes it for.  [default: today, or the day that "
        "the folder was begun with; with --store there is none]",
        metavar="YYYY-MM-DD",
    )
    supervise: Literal["assistant", "last", "all"] = option(
        "assistant", "Which tokens count: every assistant turn, the last one, or all tokens."
    )
    strict: bool = option(False, "Stop at the first unusable row.")
    shard_size: int = option(512, "Demonstrations in a shard.", range=Range(1, 10**6))

    def __post_init__(self) -> None:
        check(self)
        if self.date is not None:
            from ..encoding.date import parse_day  # here, as it loads numpy

            parse_day(self.date)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """What is scored (`rows`, or the examples of the score folder `at`), by what, and where to.

    With `in_store`, `out` is a store: the folder's name there is its fingerprint's.
    """

    model: str = field(metadata=about("Base model: a folder, or a name on the hub."))
    out: Path
    in_store: bool = False
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.")
    rows: RowSettings = RowSettings()
    at: Path | None = option(
        None,
        "Instead of demonstrations: the examples of this score folder, made with the same "
        "tokenizer; also stores this model's log-probabilities at the ids it holds.",
        metavar="DIR",
    )
    engine: EngineSettings = EngineSettings()

    def __post_init__(self) -> None:
        if self.at is not None and self.out.resolve() == self.at.resolve():
            raise UserError(f"--out {self.out}: is the folder of --at: give another --out")
