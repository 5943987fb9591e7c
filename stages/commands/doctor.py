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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show installed packages, the devices in use, and missing requirements.

    Changes nothing. The exit status is always 0.
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
    """Print the line for a shell's start-up file that enables completion.

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
