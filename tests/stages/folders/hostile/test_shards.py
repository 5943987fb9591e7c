"""Shards made to do harm, every hash and seal recomputed."""

import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.stages.folders.verify import verify
from qpipe.tests.support.examples import random_scored
from qpipe.tests.support.folders import SCORES, build, reseal, rewrite, seal

from .forged import copies, forged_shard, one_line_each, read_in_a_child

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.mark.parametrize("cut", [1, 6, 9, 10, 11, 200, 10**9])
def test_truncated_footers_are_refused(own: Path, cut: int) -> None:
    data = (own / "shard-00000.arrow").read_bytes()
    forged_shard(own, data[: max(0, len(data) - cut)])
    assert "shard-00000.arrow: damaged" in one_line_each(own)


@pytest.mark.parametrize("size", [-1, -(2**31), 0, 1, 2**31 - 1])
def test_footers_of_absurd_sizes_are_refused(own: Path, size: int) -> None:
    data = bytearray((own / "shard-00000.arrow").read_bytes())
    data[-10:-6] = struct.pack("<i", size)
    forged_shard(own, bytes(data))
    assert "shard-00000.arrow: damaged" in one_line_each(own)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["input_ids"][3].__setitem__(0, 300), "row 3 ('chats:3'): column input_ids is"),
        (lambda c: c["rank_steps_high"][3].__setitem__(0, 2), "row 3 ('chats:3'): column rank_st"),
        (lambda c: c["counts"][3].append(1), "row 3 ('chats:3'): column counts differs"),
        (lambda c: c["weights"][2].pop(), "row 2 ('chats:2'): column weights differs"),
        (lambda c: c["positions"][1].__setitem__(0, 99), "row 1 ('chats:1'): column positions is"),
        (lambda c: c["counts"][1].__setitem__(0, 0), "row 1 ('chats:1'): column counts does not"),
        (lambda c: c["trust"].__setitem__(4, None), "row 4 ('chats:4'): column trust has null"),
        (lambda c: c["trust"][4].__setitem__(0, None), "row 4 ('chats:4'): column trust has null"),
        (lambda c: c["id"].__setitem__(4, None), "row 4 ('None'): column id has null"),
        (lambda c: c.update(more=c["id"]), "its columns are not those of this format"),
        (lambda c: c.pop("trust"), "its columns are not those of this format"),
        (lambda c: [each.clear() for each in c.values()], "holds 0 rows, its manifest states 5"),
        (lambda c: [each.pop() for each in c.values()], "holds 4 rows, its manifest states 5"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_name(
    own: Path, change: Callable[[dict[str, list[Any]]], Any], words: str
) -> None:
    rewrite(own, 0, change, more=pa.string())
    reseal(own)
    assert words in one_line_each(own)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 2.0])
@pytest.mark.parametrize("name", ["trust", "weights"])
def test_numbers_that_are_none_are_found(own: Path, name: str, value: float) -> None:
    rewrite(own, 0, lambda columns: columns[name][3].__setitem__(0, value))
    reseal(own)
    if (name, value) != ("weights", 2.0):
        (found,) = verify(own)
        assert f"shard-00000.arrow, row 3 ('chats:3'): column {name} is no" in found


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("trust", pa.list_(pa.float64())),
        ("id", pa.large_string()),
        ("counts", pa.large_list(pa.uint8())),
        ("counts", pa.list_(pa.uint8(), 3)),
        ("id", pa.binary()),
    ],
)
def test_columns_of_other_types_are_refused(own: Path, name: str, other: pa.DataType) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        if pa.types.is_fixed_size_list(other):
            columns[name] = [[1, 1, 1]] * 5

    rewrite(own, 0, change, **{name: other})
    reseal(own)
    assert "its columns are not those of this format" in one_line_each(own)


def test_ids_are_not_read_of_a_shard_without_them(own: Path) -> None:
    rewrite(own, 0, lambda columns: columns.pop("id"))
    with pytest.raises(UserError, match="its columns are not those of this format"):
        open_sealed(own).ids(0)


def test_dictionaries_are_refused_before_they_are_read(own: Path) -> None:
    table = pa.table({"id": pa.array(["a", "b"]).dictionary_encode()})
    with pa.ipc.new_file(own / "shard-00000.arrow", table.schema) as writer:
        writer.write_table(table)
    reseal(own)
    assert "it holds dictionaries, unlike any shard" in one_line_each(own)


def test_batches_of_no_rows_are_read(own: Path) -> None:
    wanted = [each.id for each in read_targets(own)]
    path = own / "shard-00000.arrow"
    batch = pa.ipc.open_file(path.read_bytes()).get_batch(0)
    with pa.OSFile(str(path), "w") as file, pa.ipc.new_file(file, batch.schema) as writer:
        for each in (batch.slice(0, 0), batch, batch.slice(0, 0)):
            writer.write_batch(each)
    reseal(own)
    assert [each.id for each in read_targets(own)] == wanted
    assert list(verify(own)) == []


def test_buffers_that_declare_absurd_sizes_are_refused(own: Path) -> None:
    """The eight bytes before each zstd frame (28 b5 2f fd) say how large it will be."""
    data = (own / "shard-00000.arrow").read_bytes()
    places = [place for place in range(8, len(data)) if data[place : place + 4] == b"(\xb5/\xfd"]
    assert len(places) > 3
    declared = (2**40, 2**62, -2, -(2**63), 10**10)
    folders = copies(own, 4 * len(declared))
    for (place, size), folder in zip(product(places[:4], declared), folders, strict=True):
        changed = bytearray(data)
        changed[place - 8 : place] = struct.pack("<q", size)
        forged_shard(folder, bytes(changed))
    for said in read_in_a_child(*folders):
        assert "shard-00000.arrow: damaged" in said[1]
        assert "shard-00000.arrow: damaged" in said[2]


@pytest.mark.parametrize("shards", [[], [[]], [[random_scored(0)]]])
def test_scores_of_nothing_are_refused(tmp_path: Path, shards: list[list[Any]]) -> None:
    scores = seal(tmp_path / "scores", "score", SCORES, shards)
    with pytest.raises(UserError, match="scores: has no supervised token"):
        build(scores, tmp_path / "targets")


def test_more_rows_than_the_manifest_states_are_refused_at_once(own: Path) -> None:
    """There may be any number of record batches: they are not read to the last."""
    folder = open_sealed(own)
    path = folder.shard_path(0)
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    with pa.OSFile(str(path), "w") as file, pa.ipc.new_file(file, table.schema) as writer:
        for _ in range(50):
            writer.write_table(table)
    reseal(own)
    read: list[int] = []
    batches = open_sealed(own).batches(0)
    with pytest.raises(UserError, match="its manifest states"):
        read.extend(len(batch.ids) for batch in batches)
    assert len(read) == 1
