"""The command line: its commands and its exit status.

A command is imported when it runs, so that `qpipe --help` answers at once.
"""

import signal
import sys
from importlib import import_module

import click

from .quiet import quiet_libraries

# module and function in `commands`, and the first line of the help; in the order of the flow
_COMMANDS = {
    "score.score": "Score demonstrations under a base model.",
    "build_targets.build_targets": "Build sparse target distributions from scores.",
    "train.train": "Train a model on targets; no base model is needed.",
    "methods.compare_methods": "Compare the best results that the targets of each method allow.",
    "methods.methods": "List the target methods.",
    "status.status": "Show the progress of a folder, also while a command writes it.",
    "inspect.inspect": "Show a summary of scores or targets, then examples token by token.",
    "report.report": "Write an HTML page about targets, scores or training runs.",
    "verify.verify": "Verify every byte of a score or target folder, or of a trained model.",
    "share.share": "Copy a finished folder to a path or URL, as a dataset with a card.",
    "share.list_": "List the folders under a path or URL, one per line.",
    "share.lineage": "Show the inputs of a folder, back to the demonstrations.",
    "subset.subset": "Select demonstrations of a score or target folder into a new folder.",
    "mix.mix": "Mix target folders by weight, without copying them.",
    "exchange.import_": "Import log-probabilities of another tool as a score folder.",
    "exchange.export": "Export a score folder to a file for another tool.",
    "doctor.doctor": "Show installed packages, the devices in use, and missing requirements.",
    "doctor.completion": "Print the line for a shell's start-up file that enables completion.",
}
_PLACES = {place.partition(".")[2].strip("_").replace("_", "-"): place for place in _COMMANDS}


def command_of(name: str) -> click.Command:
    """Import and return a command."""
    module, _, function = _PLACES[name].partition(".")
    return getattr(import_module(f".commands.{module}", __package__), function)


class _Commands(click.Group):
    """The commands in the order of the flow, not of the alphabet.

    `commands` holds stand-ins, which list the commands; only the one that runs is imported.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, stand_in and command_of(stand_in.name or ""), rest


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from .commands.doctor import version_line

        click.echo(version_line())
        ctx.exit()


@click.group(cls=_Commands, context_settings={"max_content_width": 96, "show_default": True})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of qpipe, its engines and torch, and exit.",
)
def cli() -> None:
    """Offline soft targets for supervised fine-tuning.

    \b
    qpipe score          demonstrations -> scores/    a model's top-k log-probabilities (GPU)
    qpipe build-targets  scores/        -> targets/   sparse target distributions
    qpipe train          targets/       -> run/       a fine-tuned model

    Each command reads a folder and writes a folder. After a crash, run the same command again
    to resume (train resumes from its latest checkpoint). A finished command does nothing.
    `qpipe status DIR` shows the progress of a folder from any terminal.

    \b
    Exit status
      0    success
      2    user error, explained in one line
      130  stopped by Ctrl-C; the current shard, or steps since the last checkpoint, are lost
      143  stopped by SIGTERM; the same, but train writes a checkpoint first
    """


for _name, _place in _PLACES.items():
    cli.add_command(click.Command(_name, short_help=_COMMANDS[_place]))


def main() -> None:
    """Run the command line. A user error prints one line and exits with status 2."""
    from ..pipeline.signals import Terminated, ends_in_order

    with ends_in_order():
        try:
            sys.exit(_run())
        except (click.Abort, KeyboardInterrupt):
            status = 130
        except Terminated as error:
            status = error.code
        click.echo(
            "Stopped: finished shards and checkpoints are kept; run the same command again to "
            "continue.",
            err=True,
        )
    # a second Ctrl-C ends what libraries still do at exit, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _run() -> int:
    from ..pipeline.errors import UserError, escaped

    quiet_libraries()
    try:
        return cli.main(standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "qpipe"
        message = f"{error.format_message()} (`{where} --help` lists the options)"
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    click.echo(f"Error: {escaped(' '.join(message.split()))}", err=True)
    return 2
