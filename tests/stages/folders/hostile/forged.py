"""Folders made to do harm, every hash, total and seal recomputed to fit.

One clear error each, no crash, no memory set aside for what is not there. What could end the
process is read in a child.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage.json_files import sha256_of_json
from qpipe.stages.folders.verify import verify
from qpipe.tests.support.folders import reseal

MOST_MEMORY = 300  # MB above what the interpreter takes


PEAK = """
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024
"""


READ = """
import sys
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.sealed import open_sealed, read_scores, read_targets
from qpipe.stages.folders.verify import verify

before = peak()
for folder in map(Path, sys.argv[1:]):
    for read in (read_scores, read_targets, verify):
        try:
            said = [str(each) for each in read(folder)]
            print("read" if read is not verify else f"found {said}")
        except UserError as error:
            assert "\\n" not in str(error) and len(str(error)) < 700, str(error)
            print("refused", error)
print(peak() - before)
"""


def in_a_child(script: str, *arguments: object) -> list[str]:
    """The lines that a child prints."""
    command = [sys.executable, "-c", PEAK + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.splitlines()


def read_in_a_child(*folders: Path) -> list[list[str]]:
    """What read_scores, read_targets and verify say of each folder; little memory is taken."""
    *said, memory = in_a_child(READ, *folders)
    assert int(memory) < MOST_MEMORY
    assert len(said) == 3 * len(folders)
    return [said[start : start + 3] for start in range(0, len(said), 3)]


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest as someone who knows the format: all that can be recomputed is."""
    value = json.loads((folder / "manifest.json").read_text())
    value.pop("seal", None)
    change(value)
    try:
        value["fingerprint"] = sha256_of_json(value["identity"])
        for entry in value["shards"]:
            entry["fingerprint"] = value["fingerprint"]
        for name in ("rows", "tokens", "positions", "entries", "bytes"):
            value["totals"][name] = sum(entry[name] for entry in value["shards"])
        value["totals"]["read"] = value["totals"]["rows"] + value["totals"]["rejected"]
        value["seal"] = sha256_of_json(value)
    except (TypeError, KeyError, AttributeError, RecursionError, UnicodeEncodeError):
        value["seal"] = ""  # the change broke what the others are computed from
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", errors="surrogatepass")


def one_line_each(folder: Path) -> str:
    """Reader and verify refuse a folder; what the reader said."""
    with pytest.raises(UserError) as refused:
        list(read_targets(folder))
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 700
    with suppress(UserError):
        assert list(verify(folder))
    return said


def copies(own: Path, count: int) -> list[Path]:
    return [Path(shutil.copytree(own, own.with_name(f"copy{index}"))) for index in range(count)]


def forged_shard(folder: Path, data: bytes) -> None:
    """Put other bytes in place of the first shard."""
    (folder / "shard-00000.arrow").write_bytes(data)
    reseal(folder)
