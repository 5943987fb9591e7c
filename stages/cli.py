"""The command line: its commands, and how it ends.

Nothing heavy is imported before a command runs, so that `qpipe --help` answers at once.
"""

import signal
import sys

import click

from .commands.build_targets import build_targets
from .commands.doctor import completion, doctor, print_version
from .commands.exchange import export, import_
from .commands.inspect import inspect
from .commands.methods import compare_methods, methods
from .commands.mix import mix
from .commands.report import report
from .commands.score import score
from .commands.share import lineage, list_folders, share
from .commands.status import status
from .commands.subset import subset
from .commands.train import train
from .commands.verify import verify
from .quiet import quiet_libraries


class _InOrder(click.Group):
    """Commands in the order of the flow, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"max_content_width": 96, "show_default": True})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
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


for _command in (
    score,
    build_targets,
    train,
    compare_methods,
    methods,
    status,
    inspect,
    report,
    verify,
    share,
    list_folders,
    lineage,
    subset,
    mix,
    import_,
    export,
    doctor,
    completion,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line: exit status 2 and one line for what the user can mend."""
    from ..pipeline.signals import Terminated, ends_in_order

    with ends_in_order():
        try:
            sys.exit(_run())
        except (click.Abort, KeyboardInterrupt):
            status = 130
        except Terminated as error:
            status = error.code
        click.echo(
            "Stopped: finished shards and checkpoints are kept, the same command goes on after "
            "them.",
            err=True,
        )
    # what libraries still do at their end may be cut short, and without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _run() -> int:
    from ..pipeline.errors import UserError

    quiet_libraries()
    try:
        return cli.main(standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "qpipe"
        message = f"{error.format_message()} (`{where} --help` tells the options)"
    except click.ClickException as error:
        message = error.format_message()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    click.echo(f"Error: {_one_line(message)}", err=True)
    return 2


def _one_line(message: str) -> str:
    """What a terminal may show of words that may come from a file: nothing moves its cursor."""
    words = " ".join(message.split())
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in words)
