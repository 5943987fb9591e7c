"""The command line, run in this process, and killed in one of its own."""

import io
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from qpipe.stages.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    status: int
    out: str
    err: str


def run_qpipe(*words: object) -> Ran:
    """Run a command line in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["qpipe", *map(str, words)]),
        redirect_stdout(out),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, out.getvalue(), errors.getvalue())


def qpipe(*words: object, fails: bool = False) -> str:
    """What a command prints; its error, one line, where it fails."""
    done = run_qpipe(*words)
    assert done.status == (2 if fails else 0), done.err
    return done.err.strip().splitlines()[-1] if fails else done.out


def kill_after_two_shards(out: Path, *words: object) -> int:
    """Kill a command after two shards, in a process of its own; when it wrote the first, in ns."""
    qpipe = Path(sys.executable).with_name("qpipe")
    process = subprocess.Popen([qpipe, *map(str, words)], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("shard-*.json"))) < 2:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    return (out / "shard-00000.arrow").stat().st_mtime_ns
