"""Rows of one folder for the examples of another, by example id."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.join import Join
from qpipe.pipeline.folders.sealed import SealedFolder, open_sealed
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.records import TargetExample
from qpipe.tests.support.examples import targeted
from qpipe.tests.support.folders import folder_of

NUMBERS = range(3, 90)


def rows_of(numbers: Iterable[int]) -> list[TargetExample]:
    return [targeted(f"row {n}", [1, 2, n], [0.5], [{n: 0.5, 9: 0.25}]) for n in numbers]


def join_of(folder: Path, ours: Sequence[int], theirs: Sequence[int], shards: int = 2) -> Join:
    """Three shards of ours, `shards` of theirs."""
    main = folder_of(folder / "main", rows_of(ours), shards=3)
    other = folder_of(folder / "other", rows_of(theirs), shards=shards)
    return Join(open_sealed(main), open_sealed(other))


def joined(join: Join) -> list[tuple[str, Any]]:
    """The ids of the first folder, each with the example that was found."""
    return [
        pair
        for shard in join.main.shards
        for ids, found in zip(join.main.ids(shard), join.records(shard), strict=True)
        for pair in zip(ids, found, strict=True)
    ]


def drawn(seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(NUMBERS).tolist()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each read of some rows decodes."""
    counts: list[int] = []
    rows = SealedFolder.rows

    def counting(
        self: SealedFolder, shard: int, wanted: Iterable[tuple[int, NDArray[Any]]]
    ) -> Iterator[FlatBatch]:
        for batch in rows(self, shard, wanted):
            counts.append(len(batch.ids))
            yield batch

    monkeypatch.setattr(SealedFolder, "rows", counting)
    return counts


@pytest.mark.parametrize("theirs", [NUMBERS[::-1], NUMBERS, drawn(0)], ids=["-", "=", "~"])
def test_rows_in_another_order_are_found_by_id_and_decoded_once(
    tmp_path: Path, decoded: list[int], theirs: Sequence[int]
) -> None:
    join = join_of(tmp_path, NUMBERS, theirs)
    found = joined(join)
    assert [row_id for row_id, _ in found] == [f"row {n}" for n in NUMBERS]
    for (row_id, example), n in zip(found, NUMBERS, strict=True):
        assert example.id == row_id
        assert sorted(example.support_ids.tolist()) == sorted({n, 9})
    assert sum(decoded) == len(NUMBERS)
    assert (join.missing(), join.repeated()) == ([], None)


def test_batches_have_the_rows_of_the_first_folder_in_its_order(tmp_path: Path) -> None:
    join = join_of(tmp_path, NUMBERS, drawn(1), shards=4)
    for shard in join.main.shards:
        for ours, theirs in zip(join.main.batches(shard), join.batches(shard), strict=True):
            assert theirs.ids == ours.ids
            np.testing.assert_array_equal(theirs["support_ids"], ours["support_ids"])


def test_shards_with_the_same_ids_are_read_in_step(tmp_path: Path, decoded: list[int]) -> None:
    theirs = [*NUMBERS[:-2], NUMBERS[-1], NUMBERS[-2]]
    join = join_of(tmp_path, NUMBERS, theirs, shards=3)
    assert [join.is_in_step(shard) for shard in join.main.shards] == [True, True, False]
    assert [example.id for _, example in joined(join)] == [f"row {n}" for n in NUMBERS]
    assert sum(decoded) == join.main.manifest.shards[2].rows


def test_a_folder_with_fewer_shards_is_searched_for_the_rest(tmp_path: Path) -> None:
    join = join_of(tmp_path, NUMBERS[:60], NUMBERS[:60], shards=1)
    assert not any(map(join.is_in_step, join.main.shards))
    assert all(example.id == row_id for row_id, example in joined(join))


def test_missing_examples_are_none_and_listed(tmp_path: Path) -> None:
    join = join_of(tmp_path, NUMBERS, [n for n in drawn(2) if n % 10])
    missing = [f"row {n}" for n in NUMBERS if n % 10 == 0]
    assert [row_id for row_id, example in joined(join) if example is None] == missing
    assert join.missing() == missing


def test_of_repeated_examples_the_first_is_found(tmp_path: Path) -> None:
    twice = [*NUMBERS[::-1], 5]
    join = join_of(tmp_path, NUMBERS, twice)
    assert join.repeated() == "row 5"
    assert [example.id for _, example in joined(join)] == [f"row {n}" for n in NUMBERS]


def test_a_damaged_shard_is_refused_however_it_is_read(tmp_path: Path) -> None:
    for name, theirs in (("in step", NUMBERS), ("searched", NUMBERS[::-1])):
        join = join_of(tmp_path / name, NUMBERS, theirs, shards=3)
        path = join.other.shard_path(1)
        data = bytearray(path.read_bytes())
        assert data[6:8] == b"\0\0"
        data[7] = 1  # padding: only the hash changes
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"shard-00001\.arrow: damaged, its hash is not"):
            joined(join)
