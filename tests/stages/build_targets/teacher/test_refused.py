"""What a teacher's folder lacks, as it is told in one line."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.shard_run import open_folder
from qpipe.pipeline.format.records import ScoredExample

from ..made import as_bytes
from .folders import (
    SHORTER,
    VOCAB,
    build,
    built,
    folder_of,
    join_of,
    refusal,
    scored,
    taught,
)


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
