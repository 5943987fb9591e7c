"""Writers of one folder, at once and with other settings, killed or on a disk that fails.

Locks have no effect, as on NFS. One setting makes the folder, whole; the others are told.
"""

import builtins
import errno
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.tests.pipeline.conftest import Toy, random_record

from .inputs import fuzz, made_or_refused

MOST_OPERATIONS = 120
WAITS = (0.0, 0.0, 0.001, 0.004)  # seconds
PLACES = ("open", "fsync", "replace", "link", "unlink", "mkdir", "stat")


class Killed(BaseException):
    """In place of SIGKILL."""


@dataclass
class Disk:
    """Operations on the files of a folder, each after a while; some of them fail."""

    folder: str
    faults: dict[int, str]
    waits: list[float]
    count: int = 0

    def operation(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **options: Any) -> Any:
            place = arguments[0] if arguments else ""
            if not isinstance(place, int) and not str(place).startswith(self.folder):
                return real(*arguments, **options)
            self.count += 1
            fault = self.faults.get(self.count)
            if fault == "kill":
                raise Killed
            if fault == "fails":
                name = None if isinstance(place, int) else str(place)
                raise OSError(errno.EIO, os.strerror(errno.EIO), name)
            time.sleep(self.waits[self.count % len(self.waits)])
            return None if real is os.fsync else real(*arguments, **options)

        return do


@contextmanager
def failing(disk: Disk) -> Iterator[None]:
    with ExitStack() as patches:
        for module, names in ((os, PLACES), (io, ("open",)), (builtins, ("open",))):
            for name in names:
                made = disk.operation(getattr(module, name))
                patches.enter_context(patch.object(module, name, made))
        yield


class Own(Toy):
    """Its rows depend on its settings."""

    def records(self, index: int) -> list[Any]:
        rng = np.random.default_rng([index, self.settings["top_k"]])
        return [random_record(self.schema, rng, f"{index}-{n}", 8, 3, largest=99) for n in (0, 1)]


def run(folder: Path, top_k: int) -> bool | None:
    """Whether a writer made the folder, or was told why not; None for one that was killed."""
    try:
        return made_or_refused(Own(folder, settings={"top_k": top_k}).run) is not None
    except Killed:
        return None
    except OSError as error:  # one line, if it names the file
        if error.filename is None:
            raise
        return False


def judge(folder: Path, ends: list[tuple[int, bool | None]]) -> None:
    """The folder is whole, of one setting, and no writer of another thinks that it is its own."""
    setting = open_sealed(folder).settings["top_k"]
    assert {top_k for top_k, end in ends if end} == {setting}
    own = Own(folder, settings={"top_k": setting})
    expected = [each for index in range(own.shard_count) for each in own.records(index)]
    found = list(read_scores(folder))
    assert [each.id for each in found] == [each.id for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.topk_log_probs, theirs.topk_log_probs)


operations = st.integers(1, MOST_OPERATIONS)
faults = st.dictionaries(operations, st.sampled_from(["kill", "fails"]), max_size=3)
waits = st.lists(st.sampled_from(WAITS), min_size=1, max_size=7)


@fuzz(12, settings=st.lists(st.sampled_from([5, 6]), min_size=1, max_size=3), given=faults,
      waits=waits)  # fmt: skip
def test_writers(settings: list[int], given: dict[int, str], waits: list[float]) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "scores"
        ends: list[tuple[int, bool | None]] = []

        def write(top_k: int) -> None:
            ends.append((top_k, run(folder, top_k)))

        with failing(Disk(str(folder), given, waits)), patch("fcntl.flock", lambda *_: None):
            threads = [threading.Thread(target=write, args=[each]) for each in settings]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(ends) == len(settings), "a writer raised something else"
        resumed = [(each, run(folder, each)) for each in dict.fromkeys(settings)]
        assert any(end for _, end in resumed)
        judge(folder, ends + resumed)
        assert not list(folder.glob(".*.tmp"))


def test_the_judge_finds_rows_of_another_writer(tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    Own(folder, settings={"top_k": 5}).run()
    judge(folder, [(5, True), (6, False), (6, None)])
    for wrong in ([(6, True), (5, True)], [(6, True)]):
        try:
            judge(folder, list(wrong))
        except AssertionError:
            continue
        raise UserError("not found")
