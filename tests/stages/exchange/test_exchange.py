"""Scores from other tools' files and into them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pyarrow as pa
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
from qpipe.stages.demonstrations.readers import parquet_pages
from qpipe.stages.exchange import import_scores as module
from qpipe.stages.exchange.export_scores import export_scores
from qpipe.stages.exchange.import_scores import ImportStage, import_scores
from qpipe.stages.exchange.settings import ExportSettings, ImportSettings
from qpipe.stages.folders.verify import verify
from qpipe.stages.score.from_folder import score_at
from qpipe.tests.support.settings import score_settings

from ...conftest import make_scores, make_tiny_model

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def imported(path: Path, tiny_model: Path, format: str = "distillkit", **options: Any) -> Path:
    out = path.with_suffix("")
    import_scores(ImportSettings(path, format, str(tiny_model), out, **options))  # type: ignore
    assert list(verify(out)) == []
    return out


def rejects(folder: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (folder / "rejects.jsonl").open()]


def a_row(**changes: Any) -> dict[str, Any]:
    """Four tokens, the last two supervised; the entries of row r are those of token r + 1."""
    probs = [[0.5, 0.3], [0.6, 0.3], [0.25, 0.7]]
    return {
        "input_ids": [5, 6, 7, 8],
        "labels": [-100, -100, 7, 8],
        "top_ids": [[1, 2], [7, 3], [8, 4]],
        "top_logs": np.log(probs).tolist(),
    } | changes


def test_a_row_is_read_as_it_stands_there(tiny_model: Path, tmp_path: Path) -> None:
    folder = imported(write(tmp_path / "rows.parquet", [a_row()]), tiny_model)
    (example,) = read_scores(folder)
    assert example.id == "rows.parquet:1"
    assert example.positions.tolist() == [2, 3]
    assert example.counts.tolist() == [2, 2]
    assert example.topk_ids.tolist() == [7, 3, 4, 8]  # most probable first
    np.testing.assert_allclose(np.exp(example.topk_log_probs), [0.6, 0.3, 0.7, 0.25], rtol=1e-6)
    np.testing.assert_allclose(np.exp(example.observed_log_probs), [0.6, 0.25], rtol=1e-6)
    assert example.observed_ranks.tolist() == [1, 2]
    np.testing.assert_allclose(example.tail_mass, [0.1, 0.05], atol=1e-6)
    settings = read_manifest(folder, "score").settings
    assert (settings["top_k"], settings["mass"], settings["vocab_size"]) == (2, "model", 320)


def test_without_labels_every_token_counts(tiny_model: Path, tmp_path: Path) -> None:
    row = a_row(top_ids=[[6, 2], [7, 3], [8, 4]])
    del row["labels"]
    folder = imported(write(tmp_path / "rows.parquet", [row]), tiny_model)
    (example,) = read_scores(folder)
    assert example.positions.tolist() == [1, 2, 3]


def test_a_token_outside_of_the_entries_is_left_out_and_counted(
    tiny_model: Path, tmp_path: Path
) -> None:
    row = a_row(top_ids=[[1, 2], [9, 3], [8, 4]])
    folder = imported(write(tmp_path / "rows.parquet", [row]), tiny_model)
    (example,) = read_scores(folder)
    assert example.positions.tolist() == [3]
    assert example.topk_ids.tolist() == [4, 8]
    assert read_manifest(folder).totals["sums"]["left_out"] == 1


def test_padding_is_no_entry_and_no_token(tiny_model: Path, tmp_path: Path) -> None:
    row = a_row(
        input_ids=[5, 6, 7, 8, 0],
        labels=[-100, -100, 7, 8, -100],
        attention_mask=[1, 1, 1, 1, 0],
        top_ids=[[1, 2, 0], [7, 3, 0], [8, 4, 0], [0, 0, 0]],
        top_logs=[[-1.0, -2.0, -1e9], [-0.5, -2.0, -np.inf], [-0.5, -2.0, -np.inf], [-1e9] * 3],
    )
    folder = imported(write(tmp_path / "rows.parquet", [row]), tiny_model)
    (example,) = read_scores(folder)
    assert example.input_ids.tolist() == [5, 6, 7, 8]
    assert example.counts.tolist() == [2, 2]
    assert read_manifest(folder).settings["top_k"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": 5}, "column input_ids holds whole numbers, not lists of whole numbers"),
        ({"labels": [1.0] * 4}, "column labels holds lists of numbers, not lists of whole"),
        ({"attention_mask": ["1"] * 4}, "column attention_mask holds lists of string, not lists"),
    ],
)
def test_columns_of_other_kinds_are_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        imported(write(tmp_path / "rows.parquet", [a_row(**changes)]), tiny_model)


def test_a_damaged_file_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [a_row()])
    content = path.read_bytes()
    said = []
    for place in range(0, len(content), 23):
        path.write_bytes(content[:place] + b"\xff\xff" + content[place + 2 :])
        try:
            imported(path, tiny_model, top_k=2)
        except UserError as error:
            said.append(str(error))
        rmtree(tmp_path / "rows", ignore_errors=True)
    assert len(said) > 15
    assert not any("\n" in each for each in said)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_ids": [5, 6, 7, 320]}, "input_ids: a token is outside of the vocabulary"),
        ({"input_ids": [5], "attention_mask": [1]}, "1 tokens: 2 to 256 can be used"),
        ({"labels": [-100, -100, 7]}, "labels: not as many as input_ids"),
        ({"labels": [-100, -100, 9, 8]}, "labels: other tokens than input_ids"),
        ({"labels": [5, -100, -100, -100]}, "no supervised token"),
        ({"top_ids": [[1, 2], [7, 3], [8]]}, "top_ids and top_logs disagree in length"),
        ({"top_ids": [[1, 2], [7, 7], [8, 4]]}, "an id stands twice at one position"),
        ({"top_ids": [[1, 2], [7, -3], [8, 4]]}, "an id is outside of the vocabulary"),
        ({"top_ids": [[1, 2], [9, 3], [9, 4]]}, "no supervised token is among the entries"),
        ({"top_logs": [[-1.0, -2.0], [0.5, -2.0], [-1.0, -1.0]]}, "a number is no log-probability"),
        ({"top_logs": [[-1.0, -2.0], [np.nan, -2.0], [-1.0, -1.0]]}, "a number is no log-prob"),
        ({"top_logs": [[-1.0, -2.0], [-0.1, -0.1], [-1.0, -1.0]]}, "add up to 1.81"),
        ({"top_logs": [[-1.0, -2.0], [-0.1, -np.inf], [-1.0, -1.0]]}, "give a lower --top-k"),
        ({"top_ids": [[1, 2], [7, 3]], "top_logs": [[-1.0, -2.0]] * 2}, "fewer rows of entries"),
        ({"top_ids": [[1, 2], None, [8, 4]]}, "a list of entries is missing"),
        ({"attention_mask": [0, 1, 1, 1]}, "attention_mask: not ones up to the padding"),
    ],
)
def test_a_row_that_cannot_be_used_is_rejected_with_its_reason(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    whole = a_row(attention_mask=[1, 1, 1, 1])
    path = write(tmp_path / "rows.parquet", [whole, whole | changes, whole])
    folder = imported(path, tiny_model)
    (found,) = rejects(folder)
    assert reason in found
    assert read_manifest(folder).totals["read"] == 3
    assert [example.id for example in read_scores(folder)] == ["rows.parquet:1", "rows.parquet:3"]


def test_the_width_is_of_the_first_row_that_can_be_read(tiny_model: Path, tmp_path: Path) -> None:
    unusable = a_row(top_logs=[[-1.0, -2.0], None, [-1.0, -1.0]])
    folder = imported(write(tmp_path / "rows.parquet", [unusable, a_row()]), tiny_model)
    assert rejects(folder) == ["a list of entries is missing"]
    assert [example.id for example in read_scores(folder)] == ["rows.parquet:2"]


def test_an_import_that_was_killed_goes_on_behind_its_last_shard(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 2)
    path = write(tmp_path / "rows.parquet", [a_row() for _ in range(7)])
    undisturbed = imported(path, tiny_model)
    made, make = [], ImportStage.make

    def killed(*arguments: Any) -> Any:
        made.append(make(*arguments))
        if len(made) == 2:
            raise KeyboardInterrupt
        return made[-1]

    settings = ImportSettings(path, "distillkit", str(tiny_model), tmp_path / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr(ImportStage, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            import_scores(settings)
    assert (tmp_path / "resumed/shard-00000.json").exists()
    import_scores(settings)
    names = sorted(each.name for each in undisturbed.iterdir())
    assert sorted(each.name for each in (tmp_path / "resumed").iterdir()) == names
    for name in names:
        assert (tmp_path / "resumed" / name).read_bytes() == (undisturbed / name).read_bytes()
    ids = [example.id for example in read_scores(undisturbed)]
    assert ids == [f"rows.parquet:{line}" for line in range(1, 8)]


def test_rows_that_are_not_there_are_missed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.parquet", [a_row()])
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: iter(()))
    with pytest.raises(UserError, match="damaged: holds 0 of 1 rows"):
        imported(path, tiny_model, top_k=2)


# axolotl


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


# Refusals, and running again


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("{}"), "not a parquet file"),
        (lambda path: write(path, [{"text": "a"}]), "its columns are text"),
        (
            lambda path: write(
                path,
                [{"input_ids": [1], "compressed_logprobs": [[1]], "bytepacked_indices": [[1]]}],
            ),
            "its log-probabilities are packed",
        ),
        (lambda path: pq.write_table(pa.Table.from_pylist([a_row()])[:0], path), "empty"),
    ],
)
def test_files_of_another_kind_are_refused(
    tiny_model: Path, tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "rows.parquet", tiny_model)
    assert not (tmp_path / "rows").exists()


def test_a_file_whose_name_no_manifest_can_hold_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    with pytest.raises(UserError, match=r"file 'caf\\udce9.parquet': its name is not UTF-8"):
        imported(write(tmp_path / "rows.parquet", [a_row()]).rename(path), tiny_model)


def test_columns_of_axolotl_are_missed_by_name(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column target_token_ids"):
        imported(write(tmp_path / "rows.parquet", [a_row()]), tiny_model, "axolotl")


def test_a_page_of_many_values_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in demonstrations: a small page may decode to any size."""
    path = write(tmp_path / "rows.parquet", [a_row()] * 99)
    monkeypatch.setattr(parquet_pages, "MOST_VALUES", 99 * 4)
    with pytest.raises(UserError, match=r"rows.parquet: damaged: .* and 594 values, above"):
        imported(path, tiny_model)


def test_a_second_run_does_nothing_and_another_file_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.parquet", [a_row()] * 3)
    folder = imported(path, tiny_model)
    settings = ImportSettings(path, "distillkit", str(tiny_model), folder)
    assert import_scores(settings).was_done
    write(path, [a_row()] * 4)
    with pytest.raises(UserError, match=r"inputs.rows.parquet is .* there"):
        import_scores(settings)


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
