"""Work in processes of their own, forked from one that has the large libraries loaded.

A command that starts afresh spends several seconds on imports, which over some hundred runs would
be a quarter of the experiment. Each process ends with what it did, and with the one that asked.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qpipe.pipeline.errors import UserError
from qpipe.trainer.step.distributed import keep_freed_memory

_LIBRARIES = [
    "qpipe.stages.cli",
    "qpipe.stages.build_targets.stage",
    "qpipe.trainer.run.train",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(_LIBRARIES)


def in_process(log: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns; what it prints is appended to `log`.

    Raises UserError where it raises, exits with another status than 0, or is killed.
    """
    receiver, sender = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_work, args=(sender, log, work, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(f"{log}: {work.__name__} failed, its end tells why") from None
    process.join()
    return result


def qpipe(log: Path, *words: object) -> None:
    """Run one command of qpipe with the arguments that a user would type."""
    in_process(log, _command, *map(str, words))


def _work(
    sender: Connection, log: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    keep_freed_memory()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sender.send(work(*arguments))


def _command(*words: str) -> None:
    from qpipe.stages.cli import cli
    from qpipe.stages.quiet import quiet_libraries

    print(f"\n$ qpipe {' '.join(words)}", file=sys.stderr, flush=True)
    quiet_libraries()
    status = cli.main(list(words), standalone_mode=False)
    if status:
        sys.exit(status)
