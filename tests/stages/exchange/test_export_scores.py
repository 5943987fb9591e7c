"""Scores as the files of other tools."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.cli import main
from qpipe.stages.exchange.export_scores import export_scores
from qpipe.stages.exchange.settings import ExportSettings
from qpipe.stages.folders.verify import verify
from qpipe.stages.score.from_folder import score_at
from qpipe.tests.support.settings import score_settings

from ...conftest import make_scores, make_tiny_model
from .files import imported, rejects, write


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Scores of so many entries that most observed tokens are among them, not all."""
    return make_scores(tmp_path_factory.mktemp("many"), tiny_model, top_k=100)


def known_in(example: ScoredExample) -> Any:
    """Where the observed token is among the entries."""
    is_observed = example.topk_ids == np.repeat(example.observed_ids, example.counts)
    return np.add.reduceat(is_observed, np.cumsum(example.counts) - example.counts) > 0


def refuse_others(found: list[ScoredExample], wanted: list[ScoredExample]) -> None:
    """The same but for the tokens that were left out: every top-k token is there."""
    assert len(wanted) == 30
    wanted = [each for each in wanted if any(known_in(each))]
    lengths = [sum(len(each.positions) for each in examples) for examples in (found, wanted)]
    assert 40 < lengths[0] < lengths[1]
    for one, other in zip(found, wanted, strict=True):
        assert one.id == other.id
        assert one.input_ids.tolist() == other.input_ids.tolist()
        known = known_in(other)
        kept = np.repeat(known, other.counts)
        assert one.positions.tolist() == other.positions[known].tolist()
        assert one.topk_ids.tolist() == other.topk_ids[kept].tolist()
        assert one.observed_ranks.tolist() == other.observed_ranks[known].tolist()
        logs = other.topk_log_probs[kept]
        np.testing.assert_allclose(one.topk_log_probs, logs, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.tail_mass, other.tail_mass[known], atol=1e-5)


@pytest.fixture
def exported(scores: Path, tmp_path: Path) -> Path:
    export_scores(ExportSettings(scores, tmp_path / "file.parquet", "model"))
    return tmp_path / "file.parquet"


def test_positions_of_different_numbers_of_entries_are_written_and_read_again(
    scores: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A folder made by --at holds its own top k and the ids of the other, as far as they differ."""
    other = make_tiny_model(tmp_path / "other", vocab_size=320, seed=1)
    score_at(
        score_settings(
            model=str(other), at=scores, out=tmp_path / "at", engine="transformers", top_k=12
        )
    )
    examples = list(read_scores(tmp_path / "at"))
    counts = np.concatenate([example.counts for example in examples])
    assert counts.min() < counts.max()
    assert counts[0] not in (counts.min(), counts.max())
    export_scores(ExportSettings(tmp_path / "at", tmp_path / "ragged.parquet", "model"))
    written = pq.read_table(tmp_path / "ragged.parquet").to_pylist()
    for row, example in zip(written, examples, strict=True):
        ends = np.cumsum(example.counts)
        for position, count, end in zip(example.positions, example.counts, ends, strict=True):
            mask = row["target_mask"][position - 1]
            assert mask == [1] * count + [0] * (len(mask) - count)
            ids = row["target_token_ids"][position - 1][:count]
            assert ids == example.topk_ids[end - count : end].tolist()
    folder = imported(tmp_path / "ragged.parquet", tiny_model, "axolotl", mass="model", top_k=12)
    wanted = [each for each in examples if any(known_in(each))]
    for found, example in zip(read_scores(folder), wanted, strict=True):
        known = known_in(example)  # others are left out: the form has no place for them
        kept = np.repeat(known, example.counts)
        assert found.counts.tolist() == example.counts[known].tolist()
        assert found.topk_ids.tolist() == example.topk_ids[kept].tolist()
        logs = example.topk_log_probs[kept]
        np.testing.assert_allclose(found.topk_log_probs, logs, rtol=0, atol=1e-6)


def test_what_is_written_is_read_again(exported: Path, scores: Path, tiny_model: Path) -> None:
    folder = imported(exported, tiny_model, "axolotl", mass="model")
    refuse_others(list(read_scores(folder)), list(read_scores(scores)))
    build_targets(BuildSettings(folder, folder.with_name("targets"), choose("sft+kl")))
    assert list(verify(folder.with_name("targets"))) == []


def test_the_file_is_as_axolotl_documents_it(exported: Path, scores: Path) -> None:
    """One row of entries for each token, about the next one; mask 0 where its label is -100."""
    for row, example in zip(pq.read_table(exported).to_pylist(), read_scores(scores), strict=True):
        assert row["input_ids"] == example.input_ids.tolist()
        ends = np.cumsum(example.counts)
        ids = np.split(example.topk_ids, ends[:-1])
        for token, (mask, given) in enumerate(
            zip(row["target_mask"], row["target_token_ids"], strict=True)
        ):
            following = row["labels"][token + 1] if token + 1 < len(row["labels"]) else -100
            assert {bool(each) for each in mask} == {following != -100}
            if following != -100:
                place = example.positions.tolist().index(token + 1)
                assert given == ids[place].tolist()
                assert following == row["input_ids"][token + 1]


@pytest.mark.parametrize("wide", [False, True])
def test_a_file_for_veomni_gives_its_loss_the_teachers_top_k(
    scores: Path, tiny_model: Path, tmp_path: Path, wide: bool
) -> None:
    """Row t belongs to label t; the loss takes Σ exp(log p)·(log p − log q) over K entries there,
    from the logits of token t − 1 (VeOmni 0.1.12, chunk_topk_distill). `wide` positions hold more
    entries than the top k."""
    if wide:
        given = score_settings(
            model=str(tiny_model), at=scores, out=tmp_path / "at", engine="transformers", top_k=12
        )
        score_at(given)
    folder, k = (tmp_path / "at", 12) if wide else (scores, 100)
    export_scores(ExportSettings(folder, tmp_path / "file.parquet", "model", "veomni"))
    table = pq.read_table(tmp_path / "file.parquet")
    assert table.schema.names[1:4] == ["input_ids", "attention_mask", "labels"]
    assert table.schema.names[4:] == ["teacher_topk_ids", "teacher_topk_log_probs"]
    for row, example in zip(table.to_pylist(), read_scores(folder), strict=True):
        ids, logs = (np.array(row[name]) for name in table.schema.names[4:])
        labels = np.array(row["labels"])
        assert ids.shape == logs.shape == (len(example.input_ids), k)
        assert np.flatnonzero(labels != -100).tolist() == example.positions.tolist()
        assert labels[example.positions].tolist() == example.observed_ids.tolist()
        ends = np.cumsum(example.counts)
        for place, (count, end) in enumerate(zip(example.counts, ends, strict=True)):
            assert count == k or wide
            top = slice(end - count, end - count + k)
            at = example.positions[place]
            assert ids[at].tolist() == example.topk_ids[top].tolist()
            np.testing.assert_array_equal(logs[at], example.topk_log_probs[top])
        assert not np.exp(logs[labels == -100]).any()


def test_a_file_scaled_over_the_top_k_has_no_tail(
    scores: Path, tmp_path: Path, tiny_model: Path
) -> None:
    export_scores(ExportSettings(scores, tmp_path / "file.parquet"))
    for row in pq.read_table(tmp_path / "file.parquet").to_pylist():
        masses = np.exp(np.array(row["target_logprobs"])).sum(axis=1)
        assert set(np.round(masses, 5)) == {0.0, 1.0}
    folder = imported(tmp_path / "file.parquet", tiny_model, "axolotl")
    for example in read_scores(folder):
        assert not example.tail_mass.any()
    assert read_manifest(folder).settings["mass"] == "top-k"


def test_the_models_own_mass_is_not_taken_for_a_scaled_one(
    exported: Path, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=r"none of the demonstrations .* not to 1: give --mass mod"):
        imported(exported, tiny_model, "axolotl")


def test_files_of_older_versions_hold_each_tokens_own_row(
    exported: Path, scores: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(exported).to_pylist()
    for row in rows:
        for name in ("target_token_ids", "target_logprobs", "target_mask"):
            row[name] = row[name][-1:] + row[name][:-1]
    folder = imported(write(tmp_path / "older.parquet", rows), tiny_model, "axolotl", mass="model")
    refuse_others(list(read_scores(folder)), list(read_scores(scores)))


def test_a_mask_that_is_neither_is_rejected(
    exported: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(exported).to_pylist()[:2]
    rows[1]["target_mask"][0] = [1] * len(rows[1]["target_mask"][0])
    folder = imported(write(tmp_path / "odd.parquet", rows), tiny_model, "axolotl", mass="model")
    assert rejects(folder) == [
        "target_mask: neither the mask of the labels nor that of the next ones"
    ]


def test_an_export_overwrites_nothing(exported: Path, scores: Path) -> None:
    before = exported.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        export_scores(ExportSettings(scores, exported))
    assert exported.read_bytes() == before


def test_the_commands(
    scores: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = str(tmp_path / "file.parquet")

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["qpipe", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    assert run("export", str(scores), "--format", "axolotl", "--out", file) == 0
    assert "30 demonstrations" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "in")]
    assert run("import", file, "--format", "axolotl", "--model", str(tiny_model), *out) == 0
    assert "left out: not among the entries" in capsys.readouterr().out
    assert run("export", str(scores), "--format", "axolotl", "--out", file) == 2
