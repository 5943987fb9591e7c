"""The folder of the toy stage, and runs that stop in the middle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FolderBytes = Callable[[Path], dict[str, bytes]]
FILES = [
    "index.arrow",
    "manifest.json",
    "rejects.jsonl",
    "shard-00000.arrow",
    "shard-00000.json",
    "shard-00001.arrow",
    "shard-00001.json",
    "shard-00002.arrow",
    "shard-00002.json",
]


def stop_at(toy: Any, folder: Path, shard: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(folder, fail_at=shard).run()
