"""Pipes and devices in the place of a folder's files: refused, where reading would never end."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qpipe.pipeline.folders.manifest import Identity
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.storage.files import sha256_of_file
from qpipe.pipeline.storage.json_files import json_bytes

from ...support.commands import run_qpipe
from ...support.folders import seal_scores

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """Ends a read that waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return seal_scores(tmp_path / "scores")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of an unfinished training."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.json").write_bytes(json_bytes(Identity("train", {}, {}, {})))
    event = {"event": "step", "step": 1, "loss": 1.5, "tokens": 9}
    (folder / "log.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, zeros])
def test_in_a_folder_of_shards(scores: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    names = ("shard-00000.arrow", "shard-00000.json", "rejects.jsonl", "manifest.json")
    for name in names:
        whole = (scores / name).read_bytes()
        (scores / name).unlink()
        make(scores / name)
        for words in (
            ("status", scores),
            ("report", scores, "--out", tmp_path / "page.html"),
            ("inspect", scores),
            ("verify", scores),
            ("share", scores, tmp_path / "shared"),
            ("lineage", scores),
            ("subset", scores, "--where", "tokens > 0", "--out", tmp_path / "subset"),
            ("build-targets", "--scores", scores, "--out", tmp_path / "targets"),
        ):
            done = run_qpipe(*words)
            assert done.status in (0, 2), (name, words, done.err)
            assert name != "manifest.json" or done.status == 2
        assert not (tmp_path / "shared" / "manifest.json").exists() or "arrow" not in name
        (scores / name).unlink()
        (scores / name).write_bytes(whole)
        for out in ("subset", "targets", "shared"):
            for path in sorted((tmp_path / out).glob("*")):
                path.unlink()


@pytest.mark.parametrize("make", [os.mkfifo, zeros])
@pytest.mark.parametrize("name", ["log.jsonl", "plan.json", "qpipe.json"])
def test_in_a_folder_of_a_training(
    run: Path, tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (run / name).unlink(missing_ok=True)
    make(run / name)
    words = [("report", run, "--out", tmp_path / "page.html")]
    words += [("verify", run)] if name == "qpipe.json" else []
    words += [("status", run)] if name == "log.jsonl" else []
    for each in words:
        done = run_qpipe(*each)
        assert done.status == 2
        assert f"{name}: cannot be read: not a file" in done.err


def test_in_the_target_of_share(scores: Path, tmp_path: Path) -> None:
    """What an earlier `share` left there is compared with the source."""
    target = tmp_path / "shared"
    assert run_qpipe("share", scores, target).status == 0
    (target / "manifest.json").rename(target / "plan.json")
    identity = open_sealed(scores).manifest.identity
    (target / "plan.json").write_bytes(json_bytes(identity))
    (target / "README.md").unlink()
    (target / "shard-00000.arrow").unlink()
    os.mkfifo(target / "shard-00000.arrow")
    assert run_qpipe("share", scores, target).status in (0, 2)


def test_hashing_a_device(tmp_path: Path) -> None:
    from qpipe.pipeline.errors import UserError

    with pytest.raises(UserError, match="/dev/zero: cannot be read: not a file"):
        sha256_of_file(Path("/dev/zero"))
