"""Scores from other tools' files."""

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
from qpipe.stages.demonstrations.readers import parquet_pages
from qpipe.stages.exchange import import_scores as module
from qpipe.stages.exchange.import_scores import ImportStage, import_scores
from qpipe.stages.exchange.settings import ImportSettings

from .files import a_row, imported, rejects, write


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
