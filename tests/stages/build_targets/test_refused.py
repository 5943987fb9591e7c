"""What `build-targets` refuses: scores that a method cannot use, folders that do not fit."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.shard_run import open_folder
from qpipe.pipeline.methods import choose
from qpipe.pipeline.methods.definition import Choice
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.score.from_demonstrations import score
from qpipe.tests.support.methods import WITH_TEACHER
from qpipe.tests.support.settings import score_settings

from .made import (
    ALL_CHOICES,
    SFT_KL,
    Made,
    build,
    folder_bytes,
    made_in,
    one_position,
    random_dense,
    score_folder,
)


def test_cft_needs_token_weights(tmp_path: Path) -> None:
    unweighted = made_in(tmp_path / "plain", weighted=False).scores
    for form in ("frozen-weight", "frozen-target", "live"):
        settings = BuildSettings(unweighted, tmp_path / "out", choose("cft", form))
        with pytest.raises(UserError, match=r"cft needs token weights, .*plain/scores carry none"):
            build_targets(settings)
    assert not (tmp_path / "out").exists()

    weighted = made_in(tmp_path / "weighted").scores
    result = build(weighted, tmp_path / "out", "cft")
    assert result.manifest.totals["rows"] == 7


def test_a_mask_above_1_is_refused_and_its_example_named(tmp_path: Path) -> None:
    dense = [random_dense(number) for number in range(7)]
    dense[4].weights[2] = 1.5
    folder = score_folder(tmp_path / "scores", dense)

    with pytest.raises(UserError, match=r"example chats:4: a token has the weight 1\.5"):
        build(folder, tmp_path / "targets", "cft")
    build(folder, tmp_path / "weighted", "sft")  # any other takes it as a factor
    weights = [each.weights for each in read_targets(tmp_path / "weighted")]
    assert weights[4].tolist() == [1, 1, 1.5, 1]


@pytest.mark.parametrize(("top_k", "vocab_size", "is_enough"), [(19, 24, False), (12, 12, True)])
def test_eaft_frozen_needs_the_20_most_probable_tokens(
    tmp_path: Path, top_k: int, vocab_size: int, is_enough: bool
) -> None:
    dense = [random_dense(number, vocab_size) for number in range(4)]
    folder = score_folder(tmp_path / "scores", dense, top_k=top_k, vocab_size=vocab_size)

    for form in ("frozen-target", "frozen-weight"):
        settings = BuildSettings(folder, tmp_path / form, choose("eaft", form))
        if is_enough:
            build_targets(settings)
            continue
        words = "eaft needs the 20 most probable tokens, .*scores holds 19: .*--top-k 20 or more"
        with pytest.raises(UserError, match=words):
            build_targets(settings)
        assert not (tmp_path / form).exists()
    # the trainer reads the student's own
    build_targets(BuildSettings(folder, tmp_path / "live", choose("eaft", "live")))


def test_a_teacher_that_is_missing_is_refused_with_the_way_to_one(
    made: Made, tmp_path: Path
) -> None:
    for choice in ALL_CHOICES:
        if choice.method.name in WITH_TEACHER:
            with pytest.raises(UserError, match=r"needs a teacher: score .* --at") as refused:
                build_targets(BuildSettings(made.scores, tmp_path / "out", choice))
            assert str(refused.value).startswith(choice.method.name)
    assert not (tmp_path / "out").exists()


def test_contrast_is_refused_where_the_base_is_not_known_at_the_teachers_head(
    tmp_path: Path,
) -> None:
    base = [0.5, 0.3, 0.15, 0.04, 0.01]
    apart = [0.1, 0.1, 0.1, 0.1, 0.6]
    pairs = [("a", 0, base), ("b", 4, apart), ("c", 0, base), ("d", 0, apart), ("e", 0, apart)]
    scores = score_folder(
        tmp_path / "scores", [one_position(name, base, y) for name, y, _ in pairs], 2,
        top_k=2, vocab_size=5,
    )  # fmt: skip
    teacher = score_folder(
        tmp_path / "teacher", [one_position(name, q, y) for name, y, q in pairs], 2,
        top_k=2, vocab_size=5,
    )  # fmt: skip

    # of b the base is known at 4, the observed token; of d it is not
    with pytest.raises(UserError, match="example d: the base's probability of a token") as refused:
        build(scores, tmp_path / "targets", "contrast", teacher=(teacher,))
    assert "score the base with `qpipe score --at` the teacher's folder" in str(refused.value)
    with pytest.raises(UserError, match="not finished yet"):
        read_manifest(tmp_path / "targets")


@pytest.mark.parametrize(
    ("choice", "options", "words"),
    [
        (choose("asft"), {}, 'settings.method is "dft" there and "asft" now'),
        (
            choose("dft", "frozen-weight"),
            {},
            'settings.form is "frozen-target" there and "frozen-weight" now',
        ),
        (choose("dft"), {"top_p": 0.9}, "settings.top_p is 0.99 there and 0.9 now"),
        (choose("dft"), {"max_support": 8}, "settings.max_support is 64 there and 8 now"),
        (choose("dft"), {"temperature": 2.0}, "settings.temperature is 1.0 there and 2.0 now"),
    ],
)
def test_a_folder_built_otherwise_is_refused_and_left_alone(
    made: Made, tmp_path: Path, choice: Choice, options: dict[str, Any], words: str
) -> None:
    made.build(tmp_path / "targets", choose("dft"))
    assert words in refusal(made, tmp_path / "targets", choice, **options)


def test_a_folder_built_with_other_parameters_or_another_teacher_is_refused(
    made: Made, tmp_path: Path
) -> None:
    choice = choose("kd-hybrid")
    made.build(tmp_path / "targets", choice)
    refused = partial(refusal, made, tmp_path / "targets")

    other = choose("kd-hybrid", given={"lam": 0.25})
    assert "settings.parameters.lam is 0.5 there and 0.25 now" in refused(other)
    assert "settings.teacher_temperature is 1.0 there and 2.0 now" in refused(
        choice, teacher_temperature=2.0
    )
    there, now = (read_manifest(each).fingerprint for each in (made.teacher, made.scores))
    words = f'inputs.teacher is "{there}" there and "{now}" now'
    assert words in refused(choice, teacher=(made.scores,))
    assert 'inputs.teacher is "' in refused(SFT_KL)


def refusal(made: Made, folder: Path, choice: Choice, **options: Any) -> str:
    """Why a build is refused, once it is sure that it changed nothing."""
    before = folder_bytes(folder)
    with pytest.raises(UserError, match="targets: already holds `qpipe build-targets`") as refused:
        made.build(folder, choice, **options)
    assert folder_bytes(folder) == before
    return str(refused.value)


def test_truncation_is_no_matter_to_targets_of_the_observed_token_alone(
    made: Made, tmp_path: Path
) -> None:
    for name in ("sft", "label-smoothing", "iw-sft"):
        made.build(tmp_path / name, choose(name), top_p=0.9)
        assert made.build(tmp_path / name, choose(name), max_support=3).was_done


def test_a_folder_built_from_other_scores_is_refused(scores: Path, tmp_path: Path) -> None:
    dense = [random_dense(number, weighted=True) for number in range(7)]
    other = score_folder(tmp_path / "others", dense, engine="vllm")
    build(scores, tmp_path / "targets")
    of_scores, of_other = read_manifest(scores).fingerprint, read_manifest(other).fingerprint

    with pytest.raises(UserError) as refused:
        build(other, tmp_path / "targets")

    assert f'inputs.scores is "{of_scores}" there and "{of_other}" now' in str(refused.value)


def test_scores_that_are_moved_are_the_same_scores(scores: Path, tmp_path: Path) -> None:
    build(scores, tmp_path / "targets")
    moved = scores.rename(tmp_path / "elsewhere")

    assert build(moved, tmp_path / "targets").was_done


def test_the_score_folder_itself_is_no_place_for_the_targets(scores: Path) -> None:
    before = folder_bytes(scores)

    with pytest.raises(UserError, match="already holds `qpipe score` output"):
        build(scores, scores)

    assert folder_bytes(scores) == before


def test_scores_that_cannot_be_read_are_refused_before_anything_is_made(
    scores: Path, tmp_path: Path
) -> None:
    build(scores, tmp_path / "targets")
    (tmp_path / "empty").mkdir()
    for folder, words in [
        (tmp_path / "gone", "gone: no such folder"),
        (tmp_path / "empty", "empty: not a qpipe folder"),
        (tmp_path / "targets", "made by `qpipe build-targets`, but the output of `qpipe score`"),
    ]:
        with pytest.raises(UserError, match=words):
            build(folder, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_unfinished_scores_are_refused(scores: Path, tmp_path: Path) -> None:
    manifest = read_manifest(scores)
    open_folder(tmp_path / "fresh", manifest.identity)

    with pytest.raises(UserError, match="fresh: not finished yet: run `qpipe score`"):
        build(tmp_path / "fresh", tmp_path / "out")


@pytest.mark.parametrize("method", ["gift", "flow"])
def test_a_damaged_score_shard_is_refused_by_name_and_nothing_is_sealed(
    scores: Path, tmp_path: Path, method: str
) -> None:
    path = scores / "shard-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(UserError, match=r"scores/shard-00001\.arrow: damaged"):
        build(scores, tmp_path / "targets", method)
    assert not (tmp_path / "targets" / "manifest.json").exists()


def test_cft_takes_a_mask_whose_other_tokens_are_not_supervised(
    tiny_model: Path, tmp_path: Path
) -> None:
    """All tokens that were scored have the weight 1 then."""
    answer = {"role": "assistant", "content": "the answer", "spans": [[0, 3]]}
    row = {"messages": [{"role": "user", "content": "a"}, answer]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row))
    settings = score_settings(
        model=str(tiny_model),
        demonstrations=(str(tmp_path / "chats.jsonl"),),
        out=tmp_path / "scores",
        engine="transformers",
    )
    score(settings)
    [found] = read_scores(tmp_path / "scores")
    assert found.token_weights.tolist() == [1] * len(found.positions)
    result = build(tmp_path / "scores", tmp_path / "out", "cft")
    assert result.manifest.totals["rows"] == 1
