"""The settings of `qpipe score`, each an option."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ...pipeline.errors import UserError
from ...pipeline.options import Range, about, check, option
from ..demonstrations.columns import parse_columns
from ..engines.settings import EngineSettings, Host


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """The demonstrations to score, and how they become examples."""

    demonstrations: tuple[str, ...] = option(
        (),
        "Files of JSON lines (also .gz, .zst), parquet or Arrow, or the name or folder of"
        " a Hugging Face dataset.",
        metavar="FILE...",
    )
    max_length: int | None = option(
        None,
        "Maximum number of tokens of a demonstration.  [default: the model's limit, at most 4096]",
        range=Range(2),
        metavar="TOKENS",
    )
    too_long: Literal["reject", "cut"] = option(
        "reject", "Reject longer demonstrations, or cut them. Both are counted."
    )
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt-completion",
        "question-answer",
        "query-calls",
    ] = option("auto", "Format of a row. auto detects it row by row.")
    columns: tuple[str, ...] = option(
        (),
        "Fields of rows in a form of their own, as in prompt=question completion=answer or"
        " messages=data.chat. Names: prompt, completion, reasoning, system, messages, tools, id.",
        metavar="NAME=FIELD...",
    )
    template: str = option(
        "tokenizer",
        "Chat template: the tokenizer's own, none, or a Jinja file.",
        metavar="tokenizer|none|FILE",
    )
    date: str | None = option(
        None,
        "Date for a template that writes the current date.  [default: today, or the date "
        "that a resumed folder was started with; required with --store]",
        metavar="YYYY-MM-DD",
    )
    supervise: Literal["assistant", "last", "all"] = option(
        "assistant", "Supervised tokens: every assistant turn, the last one, or all tokens."
    )
    strict: bool = option(False, "Stop at the first row that cannot be used.")
    shard_size: int = option(512, "Demonstrations per shard.", range=Range(1, 10**6))

    def __post_init__(self) -> None:
        check(self)
        parse_columns(self.columns)
        if self.date is not None:
            from ..encoding.template import parse_day  # here, as it loads numpy

            parse_day(self.date)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """The input (`rows`, or the examples of the score folder `at`), the engine and the output.

    With `in_store`, `out` is a store, in which the folder is named by its fingerprint.
    """

    model: str = field(metadata=about("Base model: a local folder or a name on the Hub."))
    out: Path
    in_store: bool = False
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    rows: RowSettings = RowSettings()
    at: Path | None = option(
        None,
        "Score the examples of this score folder instead of demonstrations. The model "
        "must have the same tokenizer; its log-probabilities are also stored at the ids "
        "in that folder.",
        metavar="DIR",
    )
    context: str | None = option(
        None,
        "With --at and the --demonstrations of its folder, put this system message in front, for "
        "the teacher alone. A Jinja template over the fields of a row, as in 'The answer: "
        "{{ answer }}', or @FILE.",
        metavar="TEXT|@FILE",
    )
    precision: Literal["uint16", "float32"] = option(
        "float32",
        "Number format of stored log-probabilities. uint16 stores steps between levels, below"
        " half the bytes at a mean divergence below 1e-6 nats.",
    )
    top_p: float = option(
        1.0,
        "Store only the most probable tokens up to this probability, at most --top-k.",
        range=Range(0, 1, above=True),
    )
    engine: EngineSettings = EngineSettings()

    def __post_init__(self) -> None:
        if self.context is not None and (self.at is None or not self.rows.demonstrations):
            raise UserError(
                "--context goes with --at and --demonstrations: give the score folder and what it "
                "was made from"
            )
        check(self)
        if self.at is not None and self.top_p < 1:
            raise UserError(
                f"--top-p {self.top_p:g}: would drop ids that --at asks for: leave it out"
            )
        if self.at is not None and self.out.resolve() == self.at.resolve():
            raise UserError(f"--out {self.out}: is the folder of --at: give another --out")

    def on(self, host: Host | None) -> "ScoreSettings":
        """These settings for an engine on another machine; None is this one."""
        return replace(self, engine=replace(self.engine, host=host))
