"""What a stream yields, in which order, to which rank, and what it reads for that."""

import gc
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import count, islice, pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest, write_manifest
from qpipe.pipeline.folders.row_index import INDEX, RowOutline, id_hash, read_index, write_index
from qpipe.pipeline.folders.sealed import SealedFolder, open_sealed
from qpipe.pipeline.format.batches import FlatBatch
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.stream import (
    WINDOW_BLOCKS,
    Outline,
    TargetStream,
    are_held_out,
    epoch_of,
    open_streams,
    permutation,
)

from ...support.runs import Examples, Make

ROWS_OF_A_SHARD = 5  # of the folders made here
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3 * WINDOW_BLOCKS)


def open_folder(folder: Path, eval_fraction: float = 0.0) -> tuple[TargetStream, TargetStream]:
    return open_streams(open_sealed(folder), eval_fraction)


def epoch_ids(stream: TargetStream, epochs: int = 1, seed: int = 0) -> list[str]:
    return [example.id for example in stream.samples(seed, range(epochs * len(stream)))]


def outlined(sizes: list[int]) -> TargetStream:
    """A stream of blocks with so many rows, on no disk: the length of each row is its number."""
    shards = np.zeros(len(sizes), np.int32)
    rows = np.arange(sum(sizes), dtype=np.int32)
    starts = np.cumsum([0, *sizes])
    outline = Outline(shards, np.arange(len(sizes), dtype=np.int32), starts, rows, rows)
    return TargetStream(SealedFolder(Path(), None), outline)  # type: ignore


def without_index(folder: Path) -> Path:
    """The folder as an older version has sealed it."""
    write_manifest(folder, structs.replace(read_manifest(folder), index=""))
    (folder / INDEX).unlink(missing_ok=True)
    return folder


def living_examples() -> int:
    return sum(type(each) is TargetExample for each in gc.get_objects())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What is read while the test runs: shard, record batch and how many of its rows."""
    read: list[tuple[int, int, int]] = []
    rows_of = SealedFolder.rows

    def noting(
        self: SealedFolder, shard: int, wanted: Iterable[tuple[int, NDArray[Any]]]
    ) -> Iterator[FlatBatch]:
        wanted = list(wanted)
        batches = rows_of(self, shard, wanted)
        for (number, _), batch in zip(wanted, batches, strict=True):
            read.append((shard, number, len(batch.ids)))
            yield batch

    monkeypatch.setattr(SealedFolder, "rows", noting)
    return read


@pytest.fixture
def large(make_targets: Make, make_examples: Examples) -> Path:
    """180 examples in 36 shards of one record batch: windows of 80, 80 and 20."""
    return make_targets(make_examples(180))


@pytest.fixture
def folder(make_targets: Make, make_examples: Examples) -> Path:
    """23 examples in five shards."""
    return make_targets(make_examples(23))


def test_examples_arrive_as_written(folder: Path, make_examples: Examples) -> None:
    written = {example.id: example for example in make_examples(23)}
    stream, held_out = open_folder(folder)
    read = list(stream.in_order())
    assert [example.id for example in read] == list(written)
    assert len(held_out) == 0
    for example in read:
        for field in fields(example):
            found, expected = (getattr(each, field.name) for each in (example, written[example.id]))
            np.testing.assert_array_equal(found, expected)


def test_epochs_are_complete_and_differ(folder: Path) -> None:
    stream, _ = open_folder(folder)
    ids = epoch_ids(stream, epochs=3)
    epochs = [ids[start : start + 23] for start in (0, 23, 46)]
    assert [len(set(epoch)) for epoch in epochs] == [23, 23, 23]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [f"example-{index}" for index in range(23)]


def test_order_is_a_function_of_the_seed(folder: Path) -> None:
    stream, _ = open_folder(folder)
    assert epoch_ids(stream, 2, seed=3) == epoch_ids(stream, 2, seed=3)
    assert epoch_ids(stream, 1, seed=3) != epoch_ids(stream, 1, seed=4)


@pytest.mark.parametrize("world_size", [2, 3, 7, 30])
def test_ranks_share_one_order(folder: Path, world_size: int) -> None:
    """Dealing the ranks' samples out in turn gives the order of a single process, over epochs."""
    stream, _ = open_folder(folder)
    whole = epoch_ids(stream, epochs=3)
    dealt = [""] * len(whole)
    for rank in range(world_size):
        share = len(range(rank, len(whole), world_size))
        examples = islice(stream.samples(0, count(rank, world_size)), share)
        dealt[rank::world_size] = [example.id for example in examples]
    assert dealt == whole
    in_order = [example.id for r in range(world_size) for example in stream.in_order(r, world_size)]
    assert sorted(in_order) == sorted(set(whole))


def test_held_out_examples_are_disjoint_complete_and_stable(
    make_targets: Make, make_examples: Examples
) -> None:
    examples = make_examples(60)
    one = open_folder(make_targets(examples, "one", rows=7), 0.3)
    other = open_folder(make_targets(examples[::-1], "other", rows=60), 0.3)
    parts = [{example.id for example in stream.in_order()} for stream in one]
    assert parts == [{example.id for example in stream.in_order()} for stream in other]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {example.id for example in examples}
    assert 5 < len(parts[1]) < 35
    assert set(epoch_ids(one[0], 2)) == parts[0]
    assert [len(stream) for stream in one] == [len(part) for part in parts]


def test_held_out_by_the_hash_of_the_id() -> None:
    share = int(hashlib.sha256(b"some id").hexdigest()[:16], 16) / 2**64
    hashes = np.array([id_hash("some id")], np.uint64)
    assert are_held_out(hashes, share + 1e-9).all()
    assert not are_held_out(hashes, share - 1e-9).any()
    assert not are_held_out(hashes, 0.0).any()


def test_examples_without_supervision_are_left_out(
    make_targets: Make, make_examples: Examples
) -> None:
    bare = make_examples(1)[0]
    empty = TargetExample(
        "bare",
        bare.input_ids,
        positions=bare.positions[:0],
        trust=bare.trust[:0],
        counts=bare.counts[:0],
        support_ids=bare.support_ids[:0],
        support_probs=bare.support_probs[:0],
        tail_mass=bare.tail_mass[:0],
        weights=bare.weights[:0],
    )
    stream, _ = open_folder(make_targets([empty, *make_examples(3)]))
    assert [example.id for example in stream.in_order()] == ["example-0", "example-1", "example-2"]


def test_a_damaged_shard_is_found_before_its_rows_are_used(folder: Path) -> None:
    shard = folder / "shard-00003.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    stream, _ = open_folder(folder)
    read = stream.in_order()
    assert [next(read).id for _ in range(3 * ROWS_OF_A_SHARD)]
    with pytest.raises(UserError, match=r"shard-00003\.arrow: damaged, its hash"):
        next(read)
    with pytest.raises(UserError, match=r"shard-00003\.arrow: damaged, its hash"):
        open_folder(without_index(folder))


def test_a_shard_that_is_gone_is_named(folder: Path) -> None:
    (folder / "shard-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow: missing, the manifest names it"):
        open_folder(folder)


@pytest.mark.parametrize("content", [None, b"", b"ARROW1"])
def test_a_shard_that_breaks_after_opening_is_named(folder: Path, content: bytes | None) -> None:
    stream, _ = open_folder(folder)
    shard = folder / "shard-00002.arrow"
    shard.unlink()
    if content is not None:
        shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00002\.arrow: (missing|damaged)"):
        list(stream.samples(0, range(23)))


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_has_each_row_once_window_by_window(
    sizes: list[int], seed: int, epoch: int
) -> None:
    """All rows of the first sixteen blocks come before those of the next sixteen."""
    stream = outlined(sizes)
    rows = list(stream.lengths(seed, range(epoch * len(stream), (epoch + 1) * len(stream))))
    assert sorted(rows) == list(range(sum(sizes)))
    blocks = np.repeat(np.arange(len(sizes)), sizes)[rows].tolist()
    appearance = {block: rank for rank, block in enumerate(dict.fromkeys(blocks))}
    windows = [appearance[block] // WINDOW_BLOCKS for block in blocks]
    assert windows == sorted(windows)


def test_rows_are_shuffled_across_the_blocks_of_a_window() -> None:
    """Of 80 rows in blocks of 5, the next is of the same block in one case of twenty."""
    blocks = [row // 5 for row in outlined([5] * 16).lengths(0, range(80))]
    assert sum(one == next_ for one, next_ in pairwise(blocks)) < 15
    assert blocks != sorted(blocks)


@settings(deadline=None)
@given(SIZES, st.data())
def test_any_numbers_give_what_the_whole_sequence_has_there(
    sizes: list[int], data: st.DataObject
) -> None:
    """Restarts at any number, ranks of any world, over epochs: all read the one sequence."""
    stream = outlined(sizes)
    total = 3 * len(stream)
    whole = list(stream.lengths(7, range(total)))
    start = data.draw(st.integers(0, total))
    assert list(stream.lengths(7, range(start, total))) == whole[start:]
    world_size = data.draw(st.integers(1, 9))
    for rank in range(world_size):
        share = range(start + rank, total, world_size)
        assert list(stream.lengths(7, share)) == [whole[number] for number in share]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_samples_are_those_that_the_lengths_speak_of(large: Path, share: float) -> None:
    """Any of the samples of three epochs, with gaps of whole windows or none."""
    stream, _ = open_folder(large)
    whole = list(stream.samples(5, range(540)))
    numbers = np.flatnonzero(np.random.default_rng(0).random(540) < share).tolist()
    examples = list(stream.samples(5, numbers))
    assert [example.id for example in examples] == [whole[number].id for number in numbers]
    assert [len(example.input_ids) for example in examples] == list(stream.lengths(5, numbers))


def test_seeds_epochs_and_windows_have_orders_of_their_own() -> None:
    """Of the blocks, and of the rows in a window, wherever the blocks come from."""
    outline = outlined([3] * 2 * WINDOW_BLOCKS).outline
    epochs = [epoch_of(outline, seed, index) for seed in range(4) for index in range(4)]
    assert len({tuple(epoch.blocks) for epoch in epochs}) == 16
    patterns = set()
    for epoch in epochs:
        for window, blocks in enumerate(np.split(epoch.blocks, 2)):
            unshuffled = [3 * block + row for block in blocks.tolist() for row in range(3)]
            patterns.add(tuple(unshuffled.index(row) for row in epoch.rows(window)))
    assert len(patterns) == 32


def test_every_place_of_a_permutation_sees_every_number() -> None:
    """6,000 orders of 6: each number 1,000 times at each place, 29 being a standard deviation."""
    orders = np.array([permutation(6, seed, epoch) for seed in range(100) for epoch in range(60)])
    counts = np.array([np.bincount(column, minlength=6) for column in orders.T])
    assert np.abs(counts - 1000).max() < 5 * 29


def test_the_order_is_fixed_for_good() -> None:
    """A run that is continued under another version, ours or numpy's, goes on in the same order."""
    assert permutation(5, 1, 0).tolist() == [4, 1, 3, 2, 0]
    assert permutation(5, 1, 1).tolist() == [3, 2, 0, 1, 4]
    assert permutation(5, 1, 0, 0).tolist() == [2, 3, 0, 1, 4]


def test_an_epoch_reads_each_record_batch_once(
    large: Path, reads: list[tuple[int, int, int]]
) -> None:
    stream, _ = open_folder(large)
    assert len(list(stream.samples(0, range(360)))) == 360
    assert Counter(reads) == {(shard, 0, 5): 2 for shard in range(36)}


def test_a_resumed_stream_reads_nothing_before_its_place(
    large: Path, reads: list[tuple[int, int, int]]
) -> None:
    """From the last five samples of the second window on: these, and the four blocks after."""
    stream, _ = open_folder(large)
    whole = list(stream.samples(0, range(180)))
    window = {tuple(each[:2]) for each in reads[16:32]}
    reads.clear()
    rest = list(stream.samples(0, range(155, 180)))
    assert [example.id for example in rest] == [example.id for example in whole[155:]]
    assert sum(rows for *_, rows in reads) == 25
    assert {tuple(each[:2]) for each in reads[:-4]} <= window
    assert len(set(reads)) == len(reads) <= 9


def test_ranks_decode_their_own_rows_only(large: Path, reads: list[tuple[int, int, int]]) -> None:
    stream, _ = open_folder(large)
    for rank in range(3):
        reads.clear()
        assert len(list(stream.samples(0, range(rank, 180, 3)))) == 60
        assert sum(rows for *_, rows in reads) == 60
        assert len({each[:2] for each in reads}) == len(reads)


def test_one_window_is_read_ahead(large: Path, reads: list[tuple[int, int, int]]) -> None:
    """Of the later windows nothing is read, and nothing is kept of those before."""
    stream, _ = open_folder(large)
    samples = stream.samples(0, range(360))
    assert reads == []
    others = living_examples()
    read_by = [16, 32, 36, 52, 68, 72, 72]  # each window of 80, 80 and 20 rows, and one more
    for number, _ in enumerate(samples):
        window = number // 180 * 3 + number % 180 // 80
        assert read_by[window] <= len(reads) <= read_by[window + 1]
        if number % 20 == 0:
            assert living_examples() - others <= 2 * 80 + 1  # that of the loop


def test_the_next_window_is_decoded_while_one_is_used(
    large: Path, reads: list[tuple[int, int, int]]
) -> None:
    stream, _ = open_folder(large)
    samples = stream.samples(0, range(360))
    next(samples)
    end = monotonic() + 20
    while len(reads) < 32:
        assert monotonic() < end
        sleep(0.01)


def test_shards_of_several_record_batches(
    make_targets: Make, make_examples: Examples, reads: list[tuple[int, int, int]]
) -> None:
    """150 rows in shards of 100: batches of 64 and 36, 50."""
    stream, held_out = open_folder(make_targets(make_examples(150), rows=100), 0.2)
    trained = [example.id for example in stream.samples(0, range(len(stream)))]
    assert {each[:2] for each in reads} == {(0, 0), (0, 1), (1, 0)}
    assert len(reads) == 3
    evaluated = [example.id for example in held_out.in_order()]
    assert len(trained) + len(evaluated) == 150
    assert set(trained) | set(evaluated) == {f"example-{index}" for index in range(150)}
    assert evaluated == sorted(evaluated, key=lambda row_id: int(row_id.removeprefix("example-")))


def test_held_out_rows_never_appear(large: Path) -> None:
    stream, held_out = open_folder(large, 0.3)
    out = {example.id for example in held_out.in_order()}
    assert len(out) == len(held_out) > 20
    ids = [example.id for example in stream.samples(3, range(4 * len(stream)))]
    assert not out & set(ids)
    assert Counter(ids) == {f"example-{i}": 4 for i in range(180) if f"example-{i}" not in out}


@pytest.mark.parametrize("eval_fraction", [0.0, 0.3])
def test_a_folder_without_an_index_is_the_same_stream(large: Path, eval_fraction: float) -> None:
    with_index = open_folder(large, eval_fraction)
    older = open_folder(without_index(large), eval_fraction)
    for one, other in zip(with_index, older, strict=True):
        for name in Outline.__slots__:
            np.testing.assert_array_equal(getattr(one.outline, name), getattr(other.outline, name))
        assert epoch_ids(one) == epoch_ids(other)


def test_opening_reads_no_shard_and_the_first_sample_one_window(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    check = SealedFolder.check

    def noting(self: SealedFolder, shard: int, *, verify: bool = True) -> None:
        opened.append(shard)
        check(self, shard, verify=verify)

    monkeypatch.setattr(SealedFolder, "check", noting)
    stream, _ = open_folder(large)
    assert opened == []
    first = list(stream.samples(0, range(1)))
    assert len(first) == len(opened) == 1
    assert len(list(stream.samples(0, range(len(stream))))) == 180
    assert sorted(opened) == list(range(36))  # each hashed once, however often it is read


def relabelled(folder: Path, rows: RowOutline) -> Path:
    """The folder with another index, and a manifest that names it."""
    sha256 = write_index(folder, [rows])
    write_manifest(folder, structs.replace(read_manifest(folder), index=sha256))
    return folder


def test_an_index_that_does_not_describe_the_rows_is_refused(folder: Path) -> None:
    (rows,) = read_index(folder, read_manifest(folder))
    tokens, batches = rows.tokens.copy(), rows.batches.copy()
    tokens[:2] += np.array([1, -1]).astype(np.uint32)  # of the same sum
    stream, _ = open_folder(relabelled(folder, replace(rows, tokens=tokens)))
    with pytest.raises(UserError, match=r"shard-00000\.arrow: differs from the index"):
        next(stream.in_order())
    with pytest.raises(UserError, match=r"index\.arrow: damaged: its counts are not"):
        open_folder(relabelled(folder, replace(rows, tokens=tokens + np.uint32(1))))
    batches[0] = 1
    with pytest.raises(UserError, match=r"index\.arrow: damaged: its rows are not in order"):
        open_folder(relabelled(folder, replace(rows, batches=batches)))


def test_a_damaged_or_missing_index_is_refused(folder: Path) -> None:
    content = bytearray((folder / INDEX).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=r"index\.arrow: damaged, its hash is not the manifest's"):
        open_folder(folder)
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=r"index\.arrow: missing, the manifest names it"):
        open_folder(folder)
