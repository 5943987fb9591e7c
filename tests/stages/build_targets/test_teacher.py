"""A teacher's scores joined to the base's, by example and position."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.sealed import SealedFolder
from qpipe.pipeline.folders.shard_run import StageResult, open_folder
from qpipe.pipeline.format.records import ScoredExample, TargetExample
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets import inputs
from qpipe.stages.build_targets.inputs import open_inputs
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.build_targets.teacher import Teacher
from qpipe.tests.support.examples import dense_scored
from qpipe.tests.support.folders import in_shards, seal_shards

from .made import as_bytes, by_position

VOCAB = 12
NUMBERS = range(7)
SHORTER = 0  # a demonstration whose last token is not supervised


def scored(number: int, seed: int = 0, name: str = "", known: int = VOCAB) -> ScoredExample:
    """Demonstration `number`, of one position more, under a model that the seed decides.

    The model knows the first `known` ids; the observed token is one of them.
    """
    tokens = np.random.default_rng(number)
    size = number + 1
    input_ids = tokens.integers(0, 6, size + 3)
    positions = np.sort(tokens.choice(np.arange(1, size + 3), size, replace=False))
    logits = np.random.default_rng((seed, number)).standard_normal((size, known))
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return dense_scored(name or f"chats:{number}", input_ids, positions, log_probs, top_k=known)


def folder_of(
    folder: Path, examples: Sequence[ScoredExample], shard_size: int = 3, **settings: Any
) -> Path:
    """A score folder of these examples."""
    given = {"vocab_size": VOCAB, "top_k": VOCAB, "tokenizer_hash": "3fa9" * 16} | settings
    shards = in_shards(examples, shard_size)
    seal_shards(folder, "score", given, shards, inputs={"of": folder.name})
    return folder


def base_examples(numbers: Sequence[int] = NUMBERS) -> list[ScoredExample]:
    return [scored(number) for number in numbers]


def taught(numbers: Sequence[int] = NUMBERS) -> list[ScoredExample]:
    return [scored(number, seed=1) for number in numbers]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Seven demonstrations in three shards."""
    return folder_of(tmp_path / "base", base_examples())


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """The same, as `score --at` makes them."""
    return folder_of(tmp_path / "teacher", taught())


def build(base: Path, teacher: Path, method: str = "target-sft", **options: Any) -> StageResult:
    out = base.parent / f"targets-{teacher.name}-{method}"
    settings = {"top_p": 1.0} | options
    return build_targets(
        BuildSettings(base, out, choose(method), (teacher,), **{"precision": "float32"} | settings)
    )


def built(base: Path, teacher: Path, method: str = "target-sft") -> list[TargetExample]:
    build(base, teacher, method)
    return list(read_targets(base.parent / f"targets-{teacher.name}-{method}"))


def refusal(base: Path, teacher: Path, method: str = "target-sft") -> str:
    """Why a build is refused; it seals nothing."""
    out = base.parent / f"targets-{teacher.name}-{method}"
    with pytest.raises(UserError) as refused:
        build(base, teacher, method)
    assert not (out / "manifest.json").exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def join_of(base: Path, teacher: Path) -> Teacher:
    joined = open_inputs(base, [teacher]).teacher
    assert isinstance(joined, Teacher)
    return joined


def dense_of(example: ScoredExample) -> NDArray[np.float64]:
    """The whole distribution at each position, [N, V]."""
    probs = np.zeros((len(example.counts), VOCAB))
    ids = by_position(example.counts, example.topk_ids)
    log_probs = by_position(example.counts, example.topk_log_probs)
    for n, (row, values) in enumerate(zip(ids, log_probs, strict=True)):
        probs[n, row] = np.exp(values)
    return probs


# Joining


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


# What does not fit


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ([0, 1, 2, 3, 4, 5], "lacks 1 of the 7 examples of {base}, the first is chats:6"),
        ([6, 4, 3, 2, 0], "lacks 2 of the 7 examples of {base}, the first is chats:1"),
        ([3], "lacks 6 of the 7 examples of {base}, the first is chats:0"),
    ],
)
def test_missing_examples_are_counted_and_the_first_is_named(
    base: Path, tmp_path: Path, present: list[int], words: str
) -> None:
    teacher = folder_of(tmp_path / "teacher", taught(present))

    line = refusal(base, teacher)

    assert line.startswith(f"{teacher}: {words.format(base=base)}: score the teacher with --at ")
    assert not (tmp_path / "targets-teacher-target-sft").exists()


def with_token(example: ScoredExample, place: int, token: int) -> ScoredExample:
    input_ids = example.input_ids.copy()
    input_ids[place] = token
    return replace(example, input_ids=input_ids)


def otherwise_tokenised() -> tuple[list[ScoredExample], str]:
    """The teacher's examples, two of a batch and one of another with other tokens."""
    examples = taught()
    examples[3] = with_token(examples[3], 1, 11)
    examples[5] = with_token(with_token(examples[5], 0, 10), 3, 11)
    examples[6] = with_token(examples[6], 2, 11)
    return examples, f"chats:3, token 1 is 11, not {scored(3).input_ids[1]}"


def longer() -> tuple[list[ScoredExample], str]:
    examples = taught()
    examples[4] = replace(examples[4], input_ids=np.append(examples[4].input_ids, np.int32(7)))
    return examples, f"chats:4, token {len(scored(4).input_ids)} is 7, not absent"


def shorter() -> tuple[list[ScoredExample], str]:
    examples = taught()
    example = examples[SHORTER]
    end = len(example.input_ids) - 1
    examples[SHORTER] = replace(example, input_ids=example.input_ids[:-1])
    return examples, f"chats:{SHORTER}, token {end} is absent, not {example.input_ids[end]}"


def otherwise_supervised() -> tuple[list[ScoredExample], str]:
    examples = taught()
    free = sorted(set(range(1, 9)) - set(examples[5].positions.tolist()))
    positions = examples[5].positions.copy()
    place = int(np.searchsorted(positions, free[-1])) - 1  # moves up to the free place
    was, positions[place] = positions[place], free[-1]
    examples[5] = replace(examples[5], positions=positions)
    return examples, f"chats:5, supervised position {place} is {free[-1]}, not {was}"


@pytest.mark.parametrize("in_step", [True, False], ids=["in step", "out of step"])
@pytest.mark.parametrize(
    ("made", "differing"),
    [
        (otherwise_tokenised, 3),
        (longer, 1),
        (shorter, 1),
        (otherwise_supervised, 1),
    ],
)
def test_other_tokens_are_counted_and_the_first_is_told(
    base: Path, tmp_path: Path, made: Any, differing: int, in_step: bool
) -> None:
    examples, first = made()
    teacher = folder_of(tmp_path / "teacher", examples if in_step else examples[::-1])
    assert join_of(base, teacher).is_in_step == in_step

    line = refusal(base, teacher)

    assert line == (
        f"{teacher}: {differing} of 7 examples have other tokens than in {base}, the first: "
        f"{first}: score the teacher with --at {base}"
    )


def test_fewer_supervised_positions_are_told(base: Path, tmp_path: Path) -> None:
    examples = taught()
    whole = examples[3]
    size = len(whole.positions) - 1
    examples[3] = replace(
        whole,
        topk_ids=whole.topk_ids[: size * VOCAB],
        topk_log_probs=whole.topk_log_probs[: size * VOCAB],
        **{
            name: getattr(whole, name)[:size]
            for name in ("positions", "observed_log_probs", "observed_ranks", "counts", "tail_mass",
                         "token_weights")
        },
    )  # fmt: skip
    teacher = folder_of(tmp_path / "teacher", examples)

    line = refusal(base, teacher)

    assert "1 of 7 examples have other tokens" in line
    assert f"chats:3, supervised position {size} is absent, not {whole.positions[size]}" in line


def test_examples_of_other_tokens_that_nobody_asks_for_do_not_matter(
    base: Path, teacher: Path, tmp_path: Path
) -> None:
    extra = [with_token(scored(2, 1, name="other"), 1, 11)]
    other = folder_of(tmp_path / "other", [*extra, *taught()])

    wanted = [as_bytes(example) for example in built(base, teacher)]
    assert [as_bytes(example) for example in built(base, other)] == wanted


def test_another_tokenizer_is_refused_without_its_texts(base: Path, tmp_path: Path) -> None:
    teacher = folder_of(tmp_path / "teacher", taught(), tokenizer_hash="77ab" * 16)

    line = refusal(base, teacher)

    assert line == (
        f"{teacher}: made with another tokenizer than {base}: give the model of {teacher} and of "
        f"{base} with --tokenizer, to map their tokens by their text"
    )


# Folders that cannot be read


def test_an_unfinished_teacher_is_refused(base: Path, teacher: Path, tmp_path: Path) -> None:
    open_folder(tmp_path / "fresh", read_manifest(teacher).identity)
    assert f"{tmp_path / 'fresh'}: not finished yet: run `qpipe score`" in refusal(
        base, tmp_path / "fresh"
    )


def test_a_teacher_of_another_stage_is_refused(base: Path, teacher: Path, tmp_path: Path) -> None:
    build(base, teacher)
    targets = tmp_path / "targets-teacher-target-sft"
    line = refusal(base, targets)
    assert f"{targets}: made by `qpipe build-targets`, but the output of `qpipe score`" in line


def test_a_teacher_that_is_not_there_is_refused(base: Path, tmp_path: Path) -> None:
    assert refusal(base, tmp_path / "gone") == f"{tmp_path / 'gone'}: no such folder"


@pytest.mark.parametrize("method", ["target-sft", "token-cleaning"])
@pytest.mark.parametrize("shard_size", [3, 2], ids=["in step", "out of step"])
def test_a_damaged_teacher_is_refused_by_the_name_of_its_shard(
    base: Path, tmp_path: Path, shard_size: int, method: str
) -> None:
    teacher = folder_of(tmp_path / "teacher", taught(), shard_size)
    shard = teacher / "shard-00001.arrow"
    whole = shard.read_bytes()
    damaged = {
        "flipped": whole[: len(whole) // 2]
        + bytes([whole[len(whole) // 2] ^ 1])
        + whole[len(whole) // 2 + 1 :],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
    }
    for name, data in damaged.items():
        copy = tmp_path / name
        shutil.copytree(teacher, copy)
        (copy / shard.name).write_bytes(data)
        line = refusal(base, copy, method)
        assert f"{copy / shard.name}: " in line
        assert "damaged" in line
    (teacher / shard.name).unlink()
    assert f"{shard}: missing" in refusal(base, teacher, method)


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
