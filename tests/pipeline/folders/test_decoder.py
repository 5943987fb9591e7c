"""Folders in other people's tools: `datasets`, polars and duckdb, and the formula of a row."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from qpipe.pipeline import decoder, read_scores, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import Example

TARGET_COLUMNS = ("trust", "weights", "tail_mass", "support_ids", "support_probs")
SCORE_COLUMNS = ("observed_log_probs", "observed_ranks", "topk_ids", "topk_log_probs", "tail_mass")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def opened(folder: Path, **options: Any) -> Any:
    files = str(folder / "shard-*.arrow")
    return datasets.load_dataset("arrow", data_files=files, split="train", **options)


def expected(example: Example, names: tuple[str, ...]) -> dict[str, Any]:
    """A record as the decoder gives it."""
    ends = np.cumsum(example.counts)  # type: ignore[attr-defined]
    row: dict[str, Any] = {"id": example.id}
    for name in ("input_ids", "positions", *names):
        values = getattr(example, name)
        is_nested = name.startswith(("support", "topk"))
        row[name] = (
            [each.tolist() for each in np.split(values, ends[:-1])]
            if is_nested
            else (values.tolist())
        )
    return row


def test_a_target_folder_opens_decoded_in_datasets(targets: Path) -> None:
    rows = opened(targets).with_transform(decoder(targets))
    assert len(rows) == 30
    assert [*rows] == [expected(each, TARGET_COLUMNS) for each in read_targets(targets)]
    assert rows[7] == [*rows][7]
    assert rows[[29, 3]]["id"] == [rows[29]["id"], rows[3]["id"]]


def test_a_target_folder_streams_decoded_from_datasets(targets: Path) -> None:
    stream = opened(targets, streaming=True)
    rows = list(stream.map(decoder(targets), batched=True, batch_size=7))
    for row, example in zip(rows, read_targets(targets), strict=True):
        wanted = expected(example, TARGET_COLUMNS)
        assert {name: row[name] for name in wanted} == wanted


def test_a_score_folder_opens_in_the_same_way(scores: Path) -> None:
    rows = opened(scores).with_transform(decoder(scores))
    for row, example in zip(rows, read_scores(scores), strict=True):
        wanted = expected(example, SCORE_COLUMNS)
        assert {name: row[name] for name in wanted} == wanted


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_every_precision_is_decoded(scores: Path, tmp_path: Path, precision: Any) -> None:
    from qpipe.pipeline.methods import choose
    from qpipe.stages.build_targets.settings import BuildSettings
    from qpipe.stages.build_targets.stage import build_targets

    folder = tmp_path / "targets"
    build_targets(BuildSettings(scores, folder, choose("sft+kl"), precision=precision))
    rows = opened(folder).with_transform(decoder(folder))
    assert [*rows] == [expected(each, TARGET_COLUMNS) for each in read_targets(folder)]


def test_a_decoder_travels_to_other_processes(targets: Path) -> None:
    rows = opened(targets).map(decoder(targets), batched=True, batch_size=8, num_proc=2)
    wanted = [example.support_ids.sum() for example in read_targets(targets)]
    assert [sum(map(sum, row["support_ids"])) for row in rows] == wanted


def test_rows_that_are_not_the_folders_are_refused(targets: Path, scores: Path) -> None:
    row = opened(targets)[:1]
    with pytest.raises(UserError, match="the rows lack column tail_log_probs"):
        decoder(targets)({name: row[name] for name in row if name != "tail_log_probs"})
    with pytest.raises(UserError, match="rows are not from this folder"):
        decoder(targets)(row | {"trust": [["high"]]})
    with pytest.raises(UserError, match="counts does not add up"):
        decoder(targets)(row | {"counts": [[1] * len(row["counts"][0])]})


# The formula of docs/folders.md, with nothing of this package


def decoded_row(row: dict[str, Any], manifest: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """The ids, their probabilities and the tail's mass at each position of a row, in uint8."""
    listed = np.array(manifest["frequent_ids"].split(), int)
    others = np.setdiff1d(np.arange(manifest["identity"]["settings"]["vocab_size"]), listed)
    id_of_rank = np.append(listed, others)
    code, edges = np.arange(255), [213.33333, 236.68995, 245, 254]
    sqrt_part = (1 - np.minimum(code, edges[0]) / 220) ** 2
    log_part = np.exp(-np.interp(code, edges, [2 * np.log(33), 14, 24, 88]))
    weight = np.append(np.where(code < edges[0], sqrt_part, log_part), 0)
    steps = np.array(row["rank_steps_high"]) * 256 + row["rank_steps_low"]
    found, stop = [], 0
    for count, tail in zip(row["counts"], weight[row["tail_log_probs"]], strict=True):
        start, stop = stop, stop + count
        weights = weight[row["support_log_probs"][start:stop]]
        total = weights.sum() + tail
        found.append((id_of_rank[np.cumsum(steps[start:stop])], weights / total, tail / total))
    return found


def test_the_formula_of_the_docs_decodes_a_row(targets: Path) -> None:
    manifest = json.loads((targets / "manifest.json").read_text())
    for row, example in zip(opened(targets), read_targets(targets), strict=True):
        ids, probs, tails = zip(*decoded_row(row, manifest), strict=True)
        assert np.concatenate(ids).tolist() == example.support_ids.tolist()
        np.testing.assert_allclose(np.concatenate(probs), example.support_probs, rtol=1e-4)
        np.testing.assert_allclose(tails, example.tail_mass, rtol=1e-4)


def test_polars_and_duckdb_read_the_columns(targets: Path) -> None:
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    wanted = [example.trust.sum() for example in read_targets(targets)]
    frame = polars.concat([polars.read_ipc(path) for path in sorted(targets.glob("shard-*.arrow"))])
    assert frame["trust"].list.sum().to_list() == pytest.approx(wanted)
    shards = pa.concat_tables(
        [pa.ipc.open_file(path).read_all() for path in sorted(targets.glob("shard-*.arrow"))]
    )
    assert shards.num_rows == 30
    found = duckdb.sql("select list_sum(trust) from shards").fetchall()
    assert [each for (each,) in found] == pytest.approx(wanted)
