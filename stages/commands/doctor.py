"""The words of `qpipe doctor`, `qpipe completion` and `qpipe --version`."""

import json

import click

from ... import __version__

_LINES = {
    "bash": 'eval "$(_QPIPE_COMPLETE=bash_source qpipe)"  # in ~/.bashrc',
    "zsh": 'eval "$(_QPIPE_COMPLETE=zsh_source qpipe)"  # in ~/.zshrc',
    "fish": "_QPIPE_COMPLETE=fish_source qpipe | source  # in ~/.config/fish/config.fish",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON value.")
def doctor(as_json: bool) -> None:
    """Tell what is installed, what the commands would run on, and what they lack.

    Changes nothing, and exits with status 0 whatever it finds.
    """
    from .diagnosis import diagnose
    from .doctor_summary import print_diagnosis

    found = diagnose(__version__)
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        print_diagnosis(found)


@click.command()
@click.argument("shell", type=click.Choice(list(_LINES)))
def completion(shell: str) -> None:
    """Print the line that turns on completion of qpipe in a shell's start-up file.

    \b
    qpipe completion bash >> ~/.bashrc
    """
    click.echo(_LINES[shell])


def print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """The version, with those of the engine and of torch."""
    if wanted and not ctx.resilient_parsing:
        from .diagnosis import version_line

        click.echo(version_line(__version__))
        ctx.exit()
