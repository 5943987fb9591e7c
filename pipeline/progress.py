"""Progress bars, messages and logged events."""

import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import UserError


def say(line: str) -> None:
    """Print a line to standard error without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)


@cache
def say_once(line: str) -> None:
    """As `say`, but each line only once."""
    say(line)


def progress_bar(**options: Any) -> tqdm:
    """A tqdm bar on standard error; a line every 10 s if that is not a terminal."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(mininterval=interval, dynamic_ncols=True, **options)


def log_event(log: Path | None, event: str, **fields: Any) -> None:
    """Append an event to a file of JSON lines, if given; several processes may share it."""
    if log is None:
        return
    line = json.dumps({"time": time.time(), "event": event, **fields}) + "\n"
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise UserError(f"--log-json {log}: cannot be written: {error.strerror}") from error
