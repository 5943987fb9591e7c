"""A user's own evaluation: a command that is run on a checkpoint and prints numbers as JSON."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from ...pipeline.errors import one_line
from ...pipeline.storage.json_files import is_number
from ..settings import CHECKPOINT, parse_command

# torchrun's words to its processes, of which the command is none
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_TORCHRUN_TOO = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")


def run_command(command: str, checkpoint: Path) -> dict[str, Any]:
    """What the command says of a model folder: {"results": numbers}, or {"error": words}."""
    place = str(checkpoint.resolve())
    words = [word.replace(CHECKPOINT, place) for word in parse_command(command)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_TORCHRUN and not name.startswith(_OF_TORCHRUN_TOO)
    }
    try:
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        return {"error": one_line(error)}
    if done.returncode != 0:
        return {"error": f"exit status {done.returncode}"}
    results = _numbers(done.stdout.decode(errors="replace"))
    if not results:
        return {"error": "its last line of output is no JSON object with numbers"}
    return {"results": results}


def _numbers(output: str) -> dict[str, float]:
    """The numbers of the JSON object on the last line that is not empty."""
    lines = output.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        found = json.loads(last)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if is_number(value)}
