"""The help of every command, at a fixed width."""

from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner
from qpipe.stages.cli import cli

FOLDER = Path(__file__).with_name("help")
WIDTH = 96


def helps() -> dict[str, str]:
    """What `--help` prints, by the name of the file that pins it."""
    return {f"{'-'.join(words)}.txt": _help(words[1:]) for words in _commands(cli, ("qpipe",))}


def pinned() -> dict[str, str]:
    """The content of each pinned file, by its name."""
    return {path.name: path.read_text() for path in FOLDER.iterdir()}


def write_golden() -> None:
    """Pin the help as it is now."""
    for path in FOLDER.iterdir():
        path.unlink()
    for name, text in helps().items():
        (FOLDER / name).write_text(text)


def _commands(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _commands(inner, (*words, name))


def _help(words: tuple[str, ...]) -> str:
    done = CliRunner().invoke(cli, [*words, "--help"], prog_name="qpipe", terminal_width=WIDTH)
    assert done.exit_code == 0, done.output
    return done.output
