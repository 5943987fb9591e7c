"""The commands as real processes that start in milliseconds, and faults that strike them.

A server that has imported the commands and their libraries forks them (multiprocessing's
forkserver): each is a process of its own, runs the real `main` on real files, and can be killed. A
fault may be set to strike a process at its n-th operation on the names in its output folder: so a
test can try every moment at which files and folders appear, change their names, or go.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tqdm import tqdm

FILLER = "filler"  # beside the folder: what fills its file system
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = (
    "__main__",
    "qpipe.tests.support.processes",
    "qpipe.stages.cli",
    "qpipe.stages.commands.build_targets",
    "qpipe.stages.commands.folder_summary",
    "qpipe.stages.commands.score",
    "qpipe.stages.commands.train",
    "qpipe.stages.score.from_demonstrations",
    "qpipe.stages.engines.in_transformers.scorer",
    "qpipe.stages.build_targets.stage",
    "qpipe.stages.folders.share",
    "qpipe.trainer.run.train",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "torch._dynamo",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "array_api_compat.torch",
    "pandas",  # which pyarrow imports as it gives an array to numpy
    "pyarrow.pandas_compat",
)
_PATIENCE = 300.0  # seconds; far more than any command here takes
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, slots=True)
class Fault:
    """What strikes a process at its `number`-th operation on the names in a folder.

    Operations are counted from 1, and 0 is the start. `kind` names one of `_KINDS`; `victim` is the
    file or folder that it strikes, if that is not the folder itself.
    """

    kind: str
    number: int
    folder: Path
    victim: Path | None = None


@dataclass(slots=True)
class Command:
    """A command under way."""

    process: Any
    output: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; one that has ended gets none."""
        if self.process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit status, as subprocess tells it: a negative one is the signal that ended it."""
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {_PATIENCE:.0f} s: {self.said}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        """What it wrote, on standard output and standard error."""
        return self.output.read_text()

    @property
    def error(self) -> str:
        """The one line of a command that has refused or failed as it should."""
        assert "Traceback" not in self.said, self.said
        (line,) = [line for line in self.said.splitlines() if line.startswith("Error: ")]
        return line


def start(
    *words: object,
    output: Path,
    fault: Fault | None = None,
    environment: Mapping[str, str] | None = None,
    has_privileges: bool = True,
) -> Command:
    """Start `qpipe WORDS`; what it writes goes to the file `output`.

    `has_privileges` tells whether a superuser keeps what lets it pass over permissions.
    """
    _start_server()
    given = ([str(word) for word in words], output, fault, dict(environment or {}), has_privileges)
    process = _CONTEXT.Process(target=_run, args=given)
    process.start()
    return Command(process, output)


@cache
def _start_server() -> None:
    """Start the server, once a session, in place of one that another suite has started."""
    forkserver._forkserver._stop()
    _CONTEXT.set_forkserver_preload(list(_PRELOADED))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _run(
    words: list[str],
    output: Path,
    fault: Fault | None,
    environment: dict[str, str],
    has_privileges: bool,
) -> None:
    """Be the command, in a process that the server has forked."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    if not has_privileges:
        _give_up_privileges()
    if fault is not None:
        _prepare(fault)
    # all forks share that of the server: one killed while it holds it would stop the others
    tqdm.set_lock(threading.RLock())
    sys.argv = ["qpipe", *words]
    from qpipe.stages.cli import main

    main()


def _give_up_privileges() -> None:
    """Drop all capabilities: to a superuser without any, permissions are what they say."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _prepare(fault: Fault) -> None:
    """Let a fault strike this process when its time has come."""
    folder, left = str(fault.folder), fault.number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if left > 0 and _place(event, arguments).startswith(folder):
            left -= 1
            if left == 0:
                strike()

    def strike() -> None:
        _KINDS[fault.kind](fault.victim or fault.folder)

    if left == 0:
        strike()
    sys.addaudithook(count)


def _place(event: str, arguments: tuple[Any, ...]) -> str:
    """Where an event of Python's audit changes a name; nothing where it changes none."""
    is_change = event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
    if not is_change and not (event == "open" and arguments[2] & _WRITES):
        return ""
    path, *others = arguments
    if event in ("os.remove", "os.rmdir") and others[0] >= 0:  # in a folder that is open
        return os.readlink(f"/proc/self/fd/{others[0]}")
    return "" if isinstance(path, int) else os.fsdecode(path)


def _kill(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _forbid(folder: Path) -> None:
    """Take the permission to write from the folder and from those in it."""
    for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        each.chmod(0o555)


def _fill(folder: Path) -> None:
    """Take all the room that is left on the folder's file system."""
    with suppress(OSError), open(folder.parent / FILLER, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)


def _truncate(file: Path) -> None:
    if file.exists():
        os.truncate(file, file.stat().st_size // 2)


def _garble(file: Path) -> None:
    """Change a byte in the middle."""
    if file.exists():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def _shift_clock(seconds: float) -> Callable[[Path], None]:
    def shift(_: Path) -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + seconds
        time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    return shift


_KINDS: dict[str, Callable[[Path], None]] = {
    "kill": _kill,
    "terminate": _terminate,
    "interrupt": _interrupt,
    "forbid": _forbid,
    "fill": _fill,
    "remove": _remove,
    "truncate": _truncate,
    "garble": _garble,
    "clock forward": _shift_clock(3e8),  # ten years
    "clock back": _shift_clock(-3e8),
}
