"""What a stream yields, in which order, and to which rank."""

import hashlib
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.manifest import read_manifest
from qpipe.pipeline.records import TargetExample
from qpipe.trainer.stream import TargetStream, is_held_out, open_streams

Make = Callable[..., Path]
Examples = Callable[..., list[TargetExample]]


def open_folder(folder: Path, eval_fraction: float = 0.0) -> tuple[TargetStream, TargetStream]:
    return open_streams(folder, read_manifest(folder), eval_fraction)


def epoch_ids(stream: TargetStream, epochs: int = 1, seed: int = 0) -> list[str]:
    return [example.id for example in islice(stream.shuffled(seed), epochs * len(stream))]


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
    assert stream.positions == sum(len(example.positions) for example in written.values())
    for example in read:
        for name in (
            "input_ids",
            "positions",
            "trust",
            "support_ids",
            "support_probs",
            "tail_mass",
        ):
            np.testing.assert_array_equal(
                getattr(example, name), getattr(written[example.id], name)
            )


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


def test_one_shard_at_a_time(folder: Path) -> None:
    """All rows of a shard (five, three in the last) come before the next shard's, both shuffled."""
    stream, _ = open_folder(folder)
    numbers = [int(row_id.removeprefix("example-")) for row_id in epoch_ids(stream)]
    by_shard = [list(rows) for _, rows in groupby(numbers, key=lambda number: number // 5)]
    assert len(by_shard) == 5
    assert by_shard != sorted(by_shard)
    assert all(rows != sorted(rows) for rows in by_shard if len(rows) == 5)


@pytest.mark.parametrize("world_size", [2, 3, 7, 30])
def test_ranks_share_one_order(folder: Path, world_size: int) -> None:
    """Dealing the ranks' samples out in turn gives the order of a single process, over epochs."""
    stream, _ = open_folder(folder)
    whole = epoch_ids(stream, epochs=3)
    dealt = [""] * len(whole)
    for rank in range(world_size):
        share = len(range(rank, len(whole), world_size))
        examples = islice(stream.shuffled(0, rank, world_size), share)
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
    positions = {example.id: len(example.positions) for example in examples}
    assert one[1].positions == sum(positions[row_id] for row_id in parts[1])


def test_held_out_by_the_hash_of_the_id() -> None:
    share = int(hashlib.sha256(b"some id").hexdigest()[:16], 16) / 2**64
    assert is_held_out("some id", share + 1e-9)
    assert not is_held_out("some id", share - 1e-9)
    assert not is_held_out("some id", 0.0)


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


def test_a_damaged_shard_is_found_at_once(folder: Path) -> None:
    shard = folder / "shard-00003.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00003\.arrow: damaged, its hash"):
        open_folder(folder)
