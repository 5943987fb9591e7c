"""A teacher's scores joined to the base's, by example and position."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.folders.sealed import SealedFolder
from qpipe.stages.build_targets import inputs

from ..made import as_bytes, by_position
from .folders import (
    NUMBERS,
    VOCAB,
    base_examples,
    build,
    built,
    dense_of,
    folder_of,
    join_of,
    refusal,
    scored,
    taught,
)


def test_folders_in_step_are_read_side_by_side(
    base: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = join_of(base, teacher)
    assert joined.is_in_step
    monkeypatch.setattr(SealedFolder, "rows", None)  # nothing is searched

    read = built(base, teacher)

    assert [example.id for example in read] == [f"chats:{number}" for number in NUMBERS]
    for example, ours, theirs in zip(read, base_examples(), taught(), strict=True):
        mixed = np.sqrt(dense_of(ours) * dense_of(theirs))
        mixed /= mixed.sum(axis=1, keepdims=True)
        ids = by_position(example.counts, example.support_ids)
        probs = by_position(example.counts, example.support_probs)
        for n, (row, values) in enumerate(zip(ids, probs, strict=True)):
            assert len(row) == VOCAB
            np.testing.assert_allclose(values, mixed[n, row], rtol=2e-6)


@pytest.mark.parametrize(
    ("numbers", "extra", "shard_size"),
    [
        (NUMBERS, 0, 2),
        (NUMBERS, 0, 1),
        (NUMBERS, 0, 100),
        (NUMBERS[::-1], 0, 3),
        ([3, 0, 6, 2, 5, 1, 4], 0, 2),
        (NUMBERS, 4, 3),
        ([6, 3, 0, 1, 4, 2, 5], 4, 4),
    ],
)
def test_any_order_and_sharding_gives_the_same_targets(
    base: Path, teacher: Path, tmp_path: Path, numbers: Sequence[int], extra: int, shard_size: int
) -> None:
    more = [scored(number, seed=1, name=f"other:{number}") for number in range(extra)]
    of_these = taught(numbers)
    other = folder_of(tmp_path / "other", [*more, *of_these, *more[:0]], shard_size)
    assert not join_of(base, other).is_in_step

    for method in ("target-sft", "kd", "token-cleaning"):
        wanted = [as_bytes(example) for example in built(base, teacher, method)]
        assert len(wanted) == 7
        assert [as_bytes(example) for example in built(base, other, method)] == wanted


def test_a_batch_of_the_base_may_come_from_many_batches_of_the_teacher(tmp_path: Path) -> None:
    numbers = [number % 5 for number in range(150)]
    named = [replace(scored(number), id=f"{row}") for row, number in enumerate(numbers)]
    theirs = [replace(scored(number, 1), id=f"{row}") for row, number in enumerate(numbers)]
    base = folder_of(tmp_path / "base", named, 100)
    in_step = folder_of(tmp_path / "in-step", theirs, 100)
    mixed = folder_of(tmp_path / "mixed", [*theirs[70:], *theirs[:70]], 80)
    assert join_of(base, in_step).is_in_step
    assert not join_of(base, mixed).is_in_step

    wanted = [as_bytes(example) for example in built(base, in_step)]
    assert len(wanted) == 150
    assert [as_bytes(example) for example in built(base, mixed)] == wanted


def test_a_teacher_in_the_order_of_the_base_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder_of(tmp_path / "base", base_examples(), 3)
    other = folder_of(tmp_path / "other", taught(), 2)
    opened: list[int] = []
    read: list[str] = []
    rows = SealedFolder.rows

    def counted(self: SealedFolder, shard: int, wanted: Any) -> Any:
        opened.append(shard)
        for batch in rows(self, shard, wanted):
            read.extend(batch.ids)
            yield batch

    monkeypatch.setattr(SealedFolder, "rows", counted)
    build(base, other)

    assert opened == [0, 1, 1, 2, 3]  # shard 1 has rows of two shards of the base
    assert read == [f"chats:{number}" for number in NUMBERS]


def test_pieces_of_any_size_are_joined_to_their_own(
    base: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [as_bytes(example) for example in built(base, teacher)]
    for size in (1, 5):
        monkeypatch.setattr(inputs, "PIECE_POSITIONS", size)
        again = folder_of(tmp_path / f"again-{size}", taught())
        assert [as_bytes(example) for example in built(base, again)] == wanted


def test_duplicates_are_fine_in_step_and_refused_out_of_step(tmp_path: Path) -> None:
    numbers = [0, 1, 1, 2]
    base = folder_of(tmp_path / "base", base_examples(numbers))
    in_step = folder_of(tmp_path / "in-step", taught(numbers))
    mixed = folder_of(tmp_path / "mixed", taught([1, 0, 2, 1]))

    assert [each.id for each in built(base, in_step)] == [
        "chats:0",
        "chats:1",
        "chats:1",
        "chats:2",
    ]
    line = refusal(base, mixed)
    assert f"{mixed}: holds example chats:1 twice" in line
    assert f"its order is not that of {base}: score the teacher with --at {base}" in line


def test_duplicates_in_step_have_each_their_own_scores(tmp_path: Path) -> None:
    rows = [scored(3, seed=1), scored(3, seed=2)]
    base = folder_of(tmp_path / "base", base_examples([3, 3]))
    teacher = folder_of(tmp_path / "teacher", rows)

    first, second = built(base, teacher, "kd")

    for example, own in ((first, rows[0]), (second, rows[1])):
        probs = np.sort(example.support_probs.reshape(-1, VOCAB), axis=1)
        np.testing.assert_allclose(probs, np.sort(dense_of(own), axis=1), rtol=2e-6)


def test_a_duplicate_of_the_base_may_find_one_example_of_the_teacher(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", base_examples([1, 2, 1]))
    teacher = folder_of(tmp_path / "teacher", taught([1, 2]))

    first, _, last = built(base, teacher)

    assert as_bytes(first) == as_bytes(last)


# Models that differ


def test_the_scores_themselves_may_be_the_teacher(base: Path) -> None:
    assert join_of(base, base).is_in_step

    for method in ("kd", "target-sft"):
        for example, own in zip(built(base, base, method), base_examples(), strict=True):
            ids = by_position(example.counts, example.support_ids)
            probs = by_position(example.counts, example.support_probs)
            for n, (row, values) in enumerate(zip(ids, probs, strict=True)):
                np.testing.assert_allclose(values, dense_of(own)[n, row], rtol=2e-6)
            np.testing.assert_allclose(example.tail_mass, 0, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [20, 70_000])
def test_what_a_larger_teacher_puts_outside_of_the_bases_vocabulary_is_in_the_tail(
    base: Path, tmp_path: Path, vocab_size: int
) -> None:
    """70,000 ids are stored in four bytes each, the base's in two."""
    examples = [scored(number, seed=1, known=20) for number in NUMBERS]
    if vocab_size > 20:  # ids 12 to 19 become the last ones
        for each in examples:
            each.topk_ids[each.topk_ids >= VOCAB] += vocab_size - 20
    teacher = folder_of(tmp_path / "teacher", examples, vocab_size=vocab_size, top_k=20)

    result = build(base, teacher, "kd")

    assert result.manifest.settings["vocab_size"] == VOCAB
    for example, own in zip(built(base, teacher, "kd"), examples, strict=True):
        assert example.counts.tolist() == [VOCAB] * len(own.counts)
        ids = own.topk_ids.reshape(-1, 20)
        probs = np.exp(own.topk_log_probs.astype(np.float64)).reshape(-1, 20)
        outside = np.where(ids >= VOCAB, probs, 0).sum(axis=1)
        assert outside.min() > 0.05
        np.testing.assert_allclose(example.tail_mass, outside, rtol=1e-5)
        kept = -np.sort(-example.support_probs.reshape(-1, VOCAB), axis=1)
        inside = -np.sort(-np.where(ids < VOCAB, probs, 0), axis=1)[:, :VOCAB]
        np.testing.assert_allclose(kept, inside, rtol=1e-5)


def test_ids_that_a_smaller_teacher_does_not_know_are_in_the_tail_of_a_mixture(
    base: Path, tmp_path: Path
) -> None:
    examples = [scored(number, seed=1, known=8) for number in NUMBERS]
    teacher = folder_of(tmp_path / "teacher", examples, vocab_size=8, top_k=8)

    read = built(base, teacher)

    for example, ours, theirs in zip(read, base_examples(), examples, strict=True):
        base_probs, teacher_probs = dense_of(ours), dense_of(theirs)[:, :8]
        mixed = np.sqrt(base_probs[:, :8] * teacher_probs)
        mixed /= mixed.sum(axis=1, keepdims=True)  # the teacher has no tail, so the mixture none
        ids = by_position(example.counts, example.support_ids)
        probs = by_position(example.counts, example.support_probs)
        for n, (row, values) in enumerate(zip(ids, probs, strict=True)):
            assert sorted(row) == list(range(8))
            np.testing.assert_allclose(values, mixed[n, row], rtol=2e-6)
        np.testing.assert_allclose(example.tail_mass, 0, atol=1e-4)
