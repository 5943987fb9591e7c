"""Shards that would take gigabytes: refused before they do, read in a child."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.tests.support.examples import random_scored
from qpipe.tests.support.folders import SCORES, reseal, seal

from .forged import MOST_MEMORY, in_a_child, read_in_a_child

pytestmark = pytest.mark.usefixtures("no_sync")


def bomb(folder: Path, megabytes: int) -> int:
    """Put so many zeros into a column of the first shard; the bytes of the file."""
    table = pa.ipc.open_file((folder / "shard-00000.arrow").read_bytes()).read_all()
    schema, rows = table.schema, 16
    size = megabytes * 10**6 // rows // 4
    zeros = pa.array(np.zeros(size, np.float32))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    path = folder / "shard-00000.arrow"
    with (
        pa.OSFile(str(path), "w") as file,
        pa.ipc.new_file(file, schema, options=options) as writer,
    ):
        columns = []
        for field in schema:
            if field.name == "id":
                columns.append(pa.array(["a"] * rows))
            elif field.name == "trust":
                values = pa.concat_arrays([zeros] * rows)
                offsets = pa.array(np.arange(rows + 1) * size, pa.int32())
                columns.append(pa.ListArray.from_arrays(offsets, values))
            else:
                empty = pa.array([], field.type.value_type)
                columns.append(
                    pa.ListArray.from_arrays(pa.array([0] * (rows + 1), pa.int32()), empty)
                )
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    reseal(folder)
    return path.stat().st_size


def test_a_bomb_is_not_set_off(own: Path) -> None:
    """Zeros, ten thousand times smaller packed; the one of gigabytes is in a `slow` test."""
    assert bomb(own, 400) < 10**5
    (said,) = read_in_a_child(own)
    assert "unpacks to 400,000," in said[1]
    assert "unpacks to 400,000," in said[2]


BUILD = """
import sys
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets

before = peak()
build_targets(BuildSettings(Path(sys.argv[1]), Path(sys.argv[2]), choose("gift")))
print(peak() - before)
"""


def test_building_for_the_largest_vocabulary_takes_little_memory(tmp_path: Path) -> None:
    settings = SCORES | {"vocab_size": 2**31 - 1}
    scores = seal(tmp_path / "scores", "score", settings, [[random_scored(5)]])
    (memory,) = in_a_child(BUILD, scores, tmp_path / "targets")
    assert int(memory) < MOST_MEMORY
    (target,) = read_targets(tmp_path / "targets")
    assert len(target.positions) == 5


@pytest.mark.slow
def test_a_bomb_of_seven_gigabytes_is_not_set_off(own: Path) -> None:
    bomb(own, 7_000)
    (said,) = read_in_a_child(own)
    assert "unpacks to 7,0" in said[2]


def expanding(folder: Path, megabytes: int) -> int:
    """Scores whose entries are one byte wide and compress less than a hundredfold."""
    schema = open_sealed(folder).schema.arrow
    rng = np.random.default_rng(0)
    rows, size = 16, megabytes * 10**6 // 16
    noise = np.zeros(rows * size, np.uint8)
    noise[::100] = rng.integers(0, 255, len(noise[::100]))
    offsets = pa.array(np.arange(rows + 1) * size, pa.int32())
    columns = []
    for field in schema:
        if field.name == "id":
            columns.append(pa.array(["a"] * rows))
            continue
        wide = field.type.value_type.bit_width == 8
        values = pa.array(noise if wide else [], field.type.value_type)
        places = offsets if wide else pa.array([0] * (rows + 1), pa.int32())
        columns.append(pa.ListArray.from_arrays(places, values))
    path = folder / "shard-00000.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(path), "w") as file,
        pa.ipc.new_file(file, schema, options=options) as writer,
    ):
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    reseal(folder)
    return path.stat().st_size


def test_a_batch_that_decodes_to_gigabytes_is_refused(own: Path) -> None:
    """Below the ratio that is refused: its bytes become wider numbers."""
    assert 3 * 110 * 10**6 / expanding(own, 110) < 100
    (said,) = read_in_a_child(own)
    assert "decodes to 4,4" in said[1]
    assert "decodes to 4,4" in said[2]
