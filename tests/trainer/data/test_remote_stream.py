"""What a stream of a folder in a bucket requests, and when."""

import threading
from pathlib import Path

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import SealedFolder, open_sealed
from qpipe.pipeline.storage.remote import open_path
from qpipe.trainer.data.stream import WINDOW_BLOCKS, TargetStream, open_streams

from ...support.runs import Examples, Make
from ...support.s3 import Bucket


def opened(folder: Path) -> TargetStream:
    return open_streams(open_sealed(folder), 0.0)[0]


def epoch_ids(stream: TargetStream, epochs: int = 1) -> list[str]:
    return [example.id for example in stream.samples(0, range(epochs * len(stream)))]


@pytest.fixture
def large(make_targets: Make, make_examples: Examples) -> Path:
    """180 examples in 36 shards of one record batch."""
    return make_targets(make_examples(180))


@pytest.fixture
def remote(large: Path, s3: Bucket) -> Path:
    """The same folder in a bucket."""
    for path in large.iterdir():
        s3.put(f"targets/{path.name}", path.read_bytes())
    return open_path("s3://bucket/targets")


def test_the_shards_of_a_remote_window_are_fetched_together(
    large: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen at once, where one after another would wait for each; the order is that of a disk."""
    together = threading.Barrier(WINDOW_BLOCKS, timeout=30)
    check = SealedFolder.check

    def meeting(self: SealedFolder, shard: int) -> None:
        if len(self.checked) < WINDOW_BLOCKS:
            together.wait()
        check(self, shard)

    of_disk = epoch_ids(opened(large), 2)
    monkeypatch.setattr(SealedFolder, "check", meeting)
    assert epoch_ids(opened(remote), 2) == of_disk


def test_a_remote_shard_that_is_damaged_ends_the_stream(remote: Path, s3: Bucket) -> None:
    s3.put("targets/shard-00030.arrow", b"another shard")
    with pytest.raises(UserError, match=r"shard-00030\.arrow: damaged, its hash is not"):
        epoch_ids(opened(remote))


def test_only_a_shard_that_cannot_be_fetched_is_looked_for(
    remote: Path, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is there would be a request more for each shard."""
    looked_for: list[str] = []
    is_file = type(remote).is_file

    def noting(path: Path) -> bool:
        if path.name.startswith("shard-"):
            looked_for.append(path.name)
        return is_file(path)

    monkeypatch.setattr(type(remote), "is_file", noting)
    stream = opened(remote)
    assert len(epoch_ids(stream)) == 180
    assert looked_for == []

    s3.remove("targets/shard-00030.arrow")
    assert len(epoch_ids(opened(remote))) == 180  # from the cache
    monkeypatch.setenv("QPIPE_CACHE", f"{tmp_path / 'another'}")
    with pytest.raises(UserError, match=r"shard-00030\.arrow: missing, the manifest names it"):
        epoch_ids(opened(remote))
    assert looked_for == ["shard-00030.arrow"]
