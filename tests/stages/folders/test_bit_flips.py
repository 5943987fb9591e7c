"""A bit flipped anywhere in a folder: verify finds each, and no reader gives a wrong row."""

import hashlib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.row_index import INDEX
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.stages.folders.verify import verify
from qpipe.trainer.data.stream import open_streams

from ...support.folders import build, seal_scores

ROWS = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Scores and targets of nine demonstrations in two shards, with rejects."""
    root = tmp_path_factory.mktemp("flips")
    scores = seal_scores(root / "scores")
    return [scores, build(scores, root / "targets")]


def digest(examples: Any) -> str:
    """Of every field of every example."""
    hashing = hashlib.sha256()
    for example in examples:
        for field in fields(example):
            value = getattr(example, field.name)
            hashing.update(value.encode() if isinstance(value, str) else value.tobytes())
    return hashing.hexdigest()


def read(folder: Path) -> str:
    reader = read_scores if read_manifest(folder).identity.stage == "score" else read_targets
    return digest(reader(folder))


def stream(folder: Path) -> str:
    """As the trainer reads them."""
    samples, _ = open_streams(open_sealed(folder, "build-targets"), 0.0)
    return digest(samples.samples(0, range(2 * ROWS)))


def flip(folders: list[Path], count: int, seed: int) -> dict[str, int]:
    """Flip so many bits, one at a time, spread over the files; what became of them."""
    rng = np.random.default_rng(seed)
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.stat().st_size]
    whole = {path: path.read_bytes() for path in files}
    truth = {folder: read(folder) for folder in folders}
    streamed = stream(folders[1])
    said = {"flips": 0, "refused by readers": 0, "read as they were": 0}
    for number in range(count):
        path = files[number % len(files)]
        data = bytearray(whole[path])
        place, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[place] ^= 1 << bit
        path.write_bytes(data)
        what = f"{path.name}, byte {place}, bit {bit}"
        with suppress(UserError):  # a manifest that cannot be read
            assert list(verify(path.parent)), f"{what}: verify finds nothing"
        for reader, wanted in ((read, truth[path.parent]), (stream, streamed)):
            if reader is stream and path.parent != folders[1]:
                continue
            try:
                assert reader(path.parent) == wanted, f"{what}: {reader.__name__} is silent"
                said["read as they were"] += 1
                # only a stream reads the index
                is_unread = path.name == INDEX and reader is read
                assert path.suffix != ".arrow" or is_unread, what
            except UserError:
                said["refused by readers"] += 1
        said["flips"] += 1
        path.write_bytes(whole[path])
    assert not [each for folder in folders for each in verify(folder)]
    return said


def test_a_hundred_flipped_bits(folders: list[Path]) -> None:
    said = flip(folders, 100, seed=0)
    assert said["flips"] == 100
    assert min(said.values()) > 30


@pytest.mark.slow
def test_thousands_of_flipped_bits(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = flip(folders, 4000, seed=1)
    with capsys.disabled():
        print(f"\n{said}")
    assert said["flips"] == 4000
