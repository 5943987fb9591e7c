"""`qpipe score --at`: another model's scores at a score folder's own examples and ids."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.stages.cli import cli
from qpipe.stages.engines.in_transformers.scorer import TransformersScorer
from qpipe.stages.folders.lineage import described
from qpipe.stages.score.from_folder import score_at
from qpipe.trainer.models.files import find_model

from ....support.commands import kill_after_two_shards
from .folders import (
    SHARDS,
    TOLERANCE,
    VOCAB,
    Dense,
    another_model,
    by_position,
    check_union,
    ints,
    make_folder,
    scored_by_hand,
    settings,
)

QPIPE = Path(sys.executable).with_name("qpipe")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher: Path, scores: Path) -> Path:
    """The teacher's scores at that folder, made in one go. Not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    score_at(settings(teacher, scores, out))
    return out


def test_the_folder_holds_the_union_at_the_very_examples(
    made: Path, scores: Path, dense: Dense
) -> None:
    results, examples = list(read_scores(made)), list(read_scores(scores))
    assert [one.id for one in results] == list("abcdef")
    for result, one in zip(results, examples, strict=True):
        np.testing.assert_array_equal(result.input_ids, one.input_ids)
        np.testing.assert_array_equal(result.positions, one.positions)
        np.testing.assert_array_equal(result.token_weights, one.token_weights)
        dense_NV = dense(one)
        check_union(result, one.counts, one.topk_ids, dense_NV, top_k=5)
        observed_N = dense_NV[np.arange(len(dense_NV)), one.observed_ids]
        np.testing.assert_allclose(result.observed_log_probs, observed_N, **TOLERANCE)
    counts = np.concatenate([result.counts for result in results])
    assert counts.min() < 11 == counts.max()  # from some that overlap to none that does


def test_the_manifest_says_what_it_was_made_of(made: Path, scores: Path, teacher: Path) -> None:
    manifest, at = read_manifest(made), read_manifest(scores)
    model = find_model(str(teacher))
    assert manifest.settings == at.settings | {
        "weights_hash": model.weights_hash(),
        "engine": "transformers",
        "dtype": "float32",
        "top_k": 5,
    }
    assert manifest.identity.inputs == {"at": at.fingerprint}
    assert manifest.parents["at"]["identity"]["inputs"] == {"chats.jsonl": "0123"}
    assert [shard.rows for shard in manifest.shards] == [3, 0, 2, 1]
    results = list(read_scores(made))
    assert (manifest.totals["read"], manifest.totals["rejected"]) == (6, 0)
    for name, column, sign in (
        ("observed_nll", "observed_log_probs", -1),
        ("tail_mass", "tail_mass", 1),
    ):
        total = sign * sum(getattr(one, column).sum(dtype=np.float64) for one in results)
        assert manifest.totals["sums"][name] == pytest.approx(total, rel=1e-9)


def test_the_support_becomes_common_when_the_base_is_scored_at_it(
    made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A folder made with --at is one that another may be made at; the gathered ids come along."""
    score_at(settings(tiny_model, made, tmp_path / "out", top_k=1))
    for back, there in zip(read_scores(tmp_path / "out"), read_scores(made), strict=True):
        pairs = zip(
            by_position(back.topk_ids, back.counts),
            by_position(there.topk_ids, there.counts),
            strict=True,
        )
        assert all(set(ids.tolist()) <= set(own.tolist()) for own, ids in pairs)
        assert (back.counts - there.counts).max() <= 1  # its own mode, where that is new


def test_targets_are_built_of_it(made: Path, tmp_path: Path) -> None:
    words = ["build-targets", "--scores", str(made), "--out", str(tmp_path / "targets")]
    cli.main(words, standalone_mode=False)
    built = read_manifest(tmp_path / "targets", "build-targets").totals
    assert built["positions"] == read_manifest(made).totals["positions"]


def test_a_second_run_changes_nothing(made: Path, scores: Path, teacher: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert score_at(settings(teacher, scores, made)).was_done
    assert files == {path: path.stat().st_mtime_ns for path in made.iterdir()}
    with pytest.raises(UserError, match="top_k is 5 there and 6 now"):
        score_at(settings(teacher, scores, made, top_k=6))


def test_another_folder_of_the_same_settings_is_another_input(
    made: Path, teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = make_folder(tmp_path / "other", tiny_model, SHARDS, supervise="all")
    with pytest.raises(UserError, match=r"inputs\.at is"):
        score_at(settings(teacher, other, made))


def test_a_run_that_breaks_off_goes_on_where_it_was(
    made: Path, scores: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    scored: list[str] = []
    score_batch = TransformersScorer.score_batch

    def break_off(self: Any, batch: Any, *rest: Any) -> Any:
        if "d" in [one.id for one in batch] and "d" not in scored:
            scored.append("d")
            raise KeyboardInterrupt
        scored.extend(one.id for one in batch)
        return score_batch(self, batch, *rest)

    monkeypatch.setattr(TransformersScorer, "score_batch", break_off)
    with pytest.raises(KeyboardInterrupt):
        score_at(settings(teacher, scores, out))
    assert {path.name for path in out.glob("shard-*.json")} == {
        "shard-00000.json",
        "shard-00001.json",
    }
    scored[:] = ["d"]
    score_at(settings(teacher, scores, out))
    assert sorted(scored) == ["d", "d", "e", "f"]  # nothing of the first two shards
    assert bytes_of(out) == bytes_of(made)


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_the_same(
    teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shards = [[scored_by_hand(f"{i}", 200, i)] for i in range(12)]
    at = make_folder(tmp_path / "at", tiny_model, shards)
    score_at(settings(teacher, at, tmp_path / "undisturbed"))
    out = tmp_path / "out"
    options = {"--model": teacher, "--at": at, "--out": out, "--engine": "transformers"}
    words = [str(word) for pair in options.items() for word in pair] + ["--top-k", "5"]
    first = kill_after_two_shards(out, "score", *words)
    done = subprocess.run([QPIPE, "score", *words], capture_output=True, text=True, check=True)
    assert "12 read, 12 scored, 0 rejected" in done.stdout
    assert (out / "shard-00000.arrow").stat().st_mtime_ns == first
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_scored_the_base_is_not_said_of_the_teacher(
    tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    of_the_base = {"imported": "axolotl", "mass": "k", "server_model": "base"}
    folder = make_folder(tmp_path / "base", tiny_model, SHARDS[:1], **of_the_base)
    score_at(settings(teacher, folder, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert not of_the_base.keys() & manifest.settings.keys()
    assert described(manifest.identity).endswith("transformers in float32")


def test_ids_beyond_the_vocabulary_are_left_out(
    teacher: Path, tiny_model: Path, dense: Dense, tmp_path: Path
) -> None:
    """A base whose vocabulary is padded further: one position holds nothing but padding."""
    one = scored_by_hand("a", 60, 1, largest=399)
    ids = by_position(one.topk_ids, one.counts)
    ids[3][:] = np.arange(399, 399 - len(ids[3]), -1)
    one = replace(one, topk_ids=np.concatenate(ids))
    at = make_folder(tmp_path / "at", tiny_model, [[one]], vocab_size=400)
    score_at(settings(teacher, at, tmp_path / "out"))
    (result,) = read_scores(tmp_path / "out")
    in_vocabulary = [each[each < VOCAB] for each in ids]
    counts = ints(*map(len, in_vocabulary))
    assert counts[3] == 0 < (one.counts - counts)[0:3].sum()
    assert result.counts[3] == 5
    check_union(result, counts, np.concatenate(in_vocabulary), dense(one), top_k=5)
    assert read_manifest(tmp_path / "out").settings["vocab_size"] == VOCAB


def test_a_larger_vocabulary_than_the_folders_is_scored_whole(
    tiny_model: Path, scores: Path, tmp_path: Path
) -> None:
    """Its top k may lie where the folder has no ids."""
    model = another_model(tmp_path / "padded", tiny_model, seed=3, vocab_size=400)
    score_at(settings(model, scores, tmp_path / "out", top_k=400))
    results = list(read_scores(tmp_path / "out"))
    assert all((one.counts == 400).all() and not one.tail_mass.any() for one in results)
