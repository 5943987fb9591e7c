"""Shards with bytes changed at random: refused, or read as rows that can be."""

import shutil
from pathlib import Path

import pytest

from .forged import MOST_MEMORY, in_a_child

pytestmark = pytest.mark.usefixtures("no_sync")

MUTATE = """
import sys
import numpy as np
from pathlib import Path
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.row_checks import violations

folder, count, seed = open_sealed(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
shard = folder.shards[-1]
path = folder.shard_path(shard)
whole = path.read_bytes()
rng = np.random.default_rng(seed)
before = peak()
refused = read = 0
special = np.array([0, 1, 0x7F, 0x80, 0xFF], np.uint8)
for number in range(count):
    data = np.frombuffer(whole, np.uint8).copy()
    kind = number % 4
    for _ in range(int(rng.integers(1, 8))):
        place = int(rng.integers(len(data)))
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place : place + 8] = rng.choice(special, len(data[place : place + 8]))
        elif kind == 2:  # the tables at the end
            place = len(data) - 1 - int(rng.integers(min(len(data), 2500)))
            data[place] = rng.integers(256)
        else:
            size = int(rng.integers(1, 64))
            source = int(rng.integers(len(data) - size))
            place = int(rng.integers(len(data) - size))
            data[place : place + size] = data[source : source + size]
    path.write_bytes(data.tobytes())
    for reads_ids_alone in (False, True):
        try:
            if reads_ids_alone:
                folder.ids(shard)
            else:
                for batch in folder.batches(shard, verify=False):
                    list(violations(folder.stage, batch, folder.settings["vocab_size"]))
            read += 1
        except UserError as error:
            assert path.name in str(error) and len(str(error)) < 700, error
            refused += 1
path.write_bytes(whole)
print(refused)
print(read)
print(peak() - before)
"""


@pytest.mark.parametrize("folder", ["targets", "scores"])
def test_mutated_shards_crash_nothing(made: Path, tmp_path: Path, folder: str) -> None:
    own = Path(shutil.copytree(made / folder, tmp_path / folder))
    refused, read, memory = map(int, in_a_child(MUTATE, own, 600, 0))
    assert refused > 300
    assert refused + read == 1200
    assert memory < MOST_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["targets", "scores"])
def test_tens_of_thousands_of_mutated_shards_crash_nothing(
    made: Path, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(made / folder, tmp_path / folder))
    refused, read, memory = map(int, in_a_child(MUTATE, own, 20_000, 1))
    with capsys.disabled():
        print(f"\n{folder}: {refused} refused, {read} read, {memory} MB")
    assert refused + read == 40_000
    assert memory < MOST_MEMORY
