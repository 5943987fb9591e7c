"""The command line with any values, from options and from a file: status 0, or 2 and one line.

Commands run in this process, in a folder that is thrown away. Models, engines and training are
stand-ins; nothing goes to a network.
"""

import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml
from hypothesis import strategies as st
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.cli import command_of, main
from qpipe.stages.engines.base import scored
from qpipe.stages.score import stage as score_stage
from qpipe.trainer.run import (
    train as loop,  # here, since what takes seconds to load is not an input's fault
)

from .folders import whole
from .inputs import LONGEST_ERROR, ODD_TEXTS, Draw, damaged, folder_until_exit, fuzz, odd_values
from .tiny import VOCAB_SIZE, model

CHATS = [{"prompt": f"{number}?", "completion": f"{number}."} for number in range(5)]
COMMANDS: dict[str, list[str]] = {  # of each, words that it takes
    "score": ["--model", "tiny", "--demonstrations", "chats.jsonl", "--out", "out"],
    "score --plan": ["--model", "tiny", "--demonstrations", "chats.jsonl", "--plan"],
    "build-targets": ["--scores", "score", "--out", "out"],
    "compare-methods": ["score"],
    "train": ["--targets", "build-targets", "others", "--model", "tiny", "--out", "out"],
    "inspect": ["build-targets", "--scores", "score"],
    "report": ["build-targets", "--out", "page.html"],
    "subset": ["score", "--out", "out", "--where", "tokens > 3"],
    "verify": ["score"],
    "mix": ["build-targets=3", "others=1", "--out", "out"],
    "export": ["score", "--format", "axolotl", "--out", "out.parquet"],
    "status": ["score"],
    "list": ["."],
    "lineage": ["mix"],
}
# what would leave this process, or take a minute
LEFT_OUT = {"--executor", "--ray-address", "--workers", "--png", "--rescore", "--help", "--config"}
LEFT_OUT |= {"--server-url", "--engine", "--model", "--tokenizer", "--demonstrations", "--track"}
VALUES = (
    *("0", "1", "-1", "2", "0.5", "1.5", "nan", "inf", "-inf", "1e309", "1e-300", "1_0", "٣"),
    *("", " ", "auto", "none", "live", "frozen-weight", "gift", "dft", "token-cleaning", "kd"),
    *("beta=5", "lam=", "=1", "beta=nan", "lam=1e400", "tokens > 3", "mean_nll <", "lowest-trust"),
    *("score", "build-targets", "mix", "chats.jsonl", "missing", "s3://", "memory://a"),
    *(
        "file://b/c",
        "chats:1",
        "3,1",
        "1,",
        "a{checkpoint}",
        "'",
        "9" * 20,
        "9" * 400,
        "2147483648",
    ),
)
texts = st.sampled_from(ODD_TEXTS) | st.text("a=<>.,-1 {}'\"é\n", max_size=6)
values = st.sampled_from(VALUES) | texts


class StandIn:
    """A scorer without a model: every token is as likely as any other."""

    def score(
        self, examples: Sequence[WeightedExample], top_k: int, at: Any = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        for place, example in enumerate(examples):
            N = len(example.positions)
            log_prob = np.float32(-np.log(VOCAB_SIZE))
            ids = np.tile(np.arange(top_k), (N, 1))
            logs = np.full((N, top_k), log_prob, np.float32)
            ranks = np.full(N, VOCAB_SIZE)
            yield place, scored(example, logs[:, 0], ranks, ids, logs, VOCAB_SIZE)


@cache
def prepared() -> Path:
    """Folders of every stage, demonstrations and a model, to be copied."""
    root = folder_until_exit() / "all"
    copytree(whole("mix").parent, root)
    copytree(model(), root / "tiny")
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return root


@contextmanager
def inside() -> Iterator[Path]:
    """The current folder: a copy of what is prepared; nothing else lies beside it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as outer:
        root = copytree(prepared(), Path(outer) / "here")
        os.chdir(root)
        try:
            yield root
        finally:
            os.chdir(before)


def run(*words: str) -> tuple[int, str, str]:
    """A command's exit status, and what it prints on both streams."""
    from qpipe.pipeline.errors import UserError

    def stop(_: Any) -> Any:
        raise UserError("nothing is trained here")

    out, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["qpipe", *words]),
        patch.object(score_stage, "make_scorer", lambda *_: StandIn()),
        patch.object(loop, "train", stop),
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), errors.getvalue()
    raise AssertionError("main ends the process")


def check(status: int, errors: str) -> None:
    """Success, or a last line that says what is wrong."""
    assert status in (0, 2), errors
    if status == 2:
        last = errors.rstrip("\n").rpartition("\n")[2]
        last = last.rpartition("\r")[2]  # after a progress bar
        assert last.startswith("Error: ") or "Usage" in errors, errors
        assert "Traceback" not in errors
        assert len(last) < 2 * LONGEST_ERROR, last


def options_of(command: str) -> list[Any]:
    parameters = command_of(command.split()[0]).params
    return [each for each in parameters if not set(each.opts) & LEFT_OUT and each.opts[0][0] == "-"]


@st.composite
def words(draw: Draw) -> list[str]:
    """A command with words that it takes, some of them changed, and more of its options.

    Half a surrogate pair or a NUL cannot be typed, only written in a file.
    """
    command = draw(st.sampled_from(list(COMMANDS)))
    given = list(COMMANDS[command])
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(given) - 1))
        if draw(st.booleans()):
            given[place] = draw(values)
        else:
            del given[place]
        if not given:
            break
    for option in draw(st.lists(st.sampled_from(options_of(command) or [None]), max_size=3)):
        if option is not None:
            name = draw(st.sampled_from([*option.opts, *option.secondary_opts]))
            given += [name] if option.is_flag else [name, draw(values)]
    typed = (each.encode(errors="replace").decode().replace("\0", "?") for each in given)
    return [command.split()[0], *typed]


@fuzz(30, given=words())
def test_words_of_any_kind(given: list[str]) -> None:
    with inside():
        status, _, errors = run(*given)
        check(status, errors)


@st.composite
def config_files(draw: Draw) -> tuple[str, bytes]:
    """A command, and a file of its options with values of any kind."""
    command = draw(st.sampled_from([each for each in COMMANDS if takes_config(each)]))
    names = [each.opts[0].removeprefix("--") for each in options_of(command)]
    names += ["no-such-option", "config", "", "3"]
    keys = st.sampled_from(names)
    if draw(st.booleans()):
        keys = keys.map(lambda name: name.replace("-", "_"))
    config: Any = draw(st.dictionaries(keys, values | shallow_values, max_size=4))
    match draw(st.integers(0, 5)):
        case 0:
            config = {command.split()[0]: config}
        case 1:
            config = draw(shallow_values)
    content = yaml.safe_dump(config, allow_unicode=True).encode(errors="surrogatepass")
    return command, draw(damaged(content)) if draw(st.integers(0, 2)) == 0 else content


def takes_config(command: str) -> bool:
    return any("--config" in each.opts for each in command_of(command.split()[0]).params)


def is_shallow(value: object) -> bool:
    """Whether yaml can write it."""
    try:
        return len(repr(value)) < 300
    except RecursionError:
        return False


shallow_values = odd_values.filter(is_shallow)


@fuzz(40, drawn=config_files())
def test_config_files_of_any_kind(drawn: tuple[str, bytes]) -> None:
    command, content = drawn
    with inside() as folder:
        (folder / "config.yaml").write_bytes(content)
        status, _, errors = run(command.split()[0], *COMMANDS[command], "--config", "config.yaml")
        check(status, errors)
