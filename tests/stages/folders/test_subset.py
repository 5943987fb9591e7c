"""Some rows of a folder as a folder of the same stage."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.format.records import Example
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.cli import main
from qpipe.stages.folders.settings import SubsetSettings
from qpipe.stages.folders.subset import subset
from qpipe.stages.folders.verify import verify

from ...support.examples import random_scored
from ...support.folders import SCORES, seal


def taken(folder: Path, out: Path, *where: str, ids: Path | None = None) -> Path:
    subset(SubsetSettings(folder, out, ids, where))
    assert list(verify(out)) == []
    return out


def as_bytes(example: Example) -> list[Any]:
    values = [getattr(example, field.name) for field in fields(example)]
    return [each if isinstance(each, str) else each.tobytes() for each in values]


def id_file(path: Path, *ids: str) -> Path:
    path.write_text("".join(f"{each}\n" for each in ids))
    return path


def nll(example: Any) -> float:
    return float(-example.observed_log_probs.mean(dtype=np.float64))


def test_scores_below_a_mean_loss(scores: Path, tmp_path: Path) -> None:
    examples = list(read_scores(scores))
    limit = sorted(map(nll, examples))[10]
    folder = taken(scores, tmp_path / "easy", f"mean_nll < {limit!r}")
    wanted = [as_bytes(example) for example in examples if nll(example) < limit]
    assert [as_bytes(example) for example in read_scores(folder)] == wanted
    assert len(wanted) == 10
    sums = read_manifest(folder, "score").totals["sums"]
    total = sum(nll(each) * len(each.positions) for each in examples if nll(each) < limit)
    assert sums["observed_nll"] == pytest.approx(total)


def test_targets_are_copied_code_by_code(targets: Path, tmp_path: Path) -> None:
    """Decoding and storing again would move a code here and there."""
    folder = taken(targets, tmp_path / "some", "supervised_tokens >= 7", "tokens < 30")
    examples = [e for e in read_targets(targets) if len(e.positions) >= 7 and len(e.input_ids) < 30]
    assert 0 < len(examples) < 30
    assert [as_bytes(e) for e in read_targets(folder)] == [as_bytes(e) for e in examples]
    stored = [pa.ipc.open_file(path).read_all() for path in sorted(targets.glob("shard-*.arrow"))]
    wanted = {row["id"]: row for row in pa.concat_tables(stored).to_pylist()}
    own = [pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("shard-*.arrow"))]
    for row in pa.concat_tables(own).to_pylist():
        assert row == wanted[row["id"]]
    trust = sum(float(e.trust.sum(dtype=np.float64)) for e in examples)
    assert read_manifest(folder).totals["sums"]["trust"] == pytest.approx(trust)


def test_rows_of_a_list_of_ids(scores: Path, tmp_path: Path) -> None:
    ids = id_file(tmp_path / "ids", "chats.jsonl:29", "chats.jsonl:2", "", "chats.jsonl:14")
    folder = taken(scores, tmp_path / "some", ids=ids)
    found = [example.id for example in read_scores(folder)]
    assert found == ["chats.jsonl:2", "chats.jsonl:14", "chats.jsonl:29"]


def test_the_manifest_names_the_source_and_the_condition(targets: Path, tmp_path: Path) -> None:
    folder = taken(targets, tmp_path / "some", "mean_trust>0.5", "tokens <= 1e2")
    source, manifest = read_manifest(targets), read_manifest(folder, "build-targets")
    assert manifest.identity.inputs == {"source": source.fingerprint}
    assert manifest.settings == source.settings | {
        "subset": {"ids": None, "where": [["mean_trust", ">", 0.5], ["tokens", "<=", 100.0]]}
    }
    assert manifest.parents["source"]["parents"] == source.parents
    other = taken(targets, tmp_path / "other", "tokens <= 100", "mean_trust > 0.50")
    assert read_manifest(other).fingerprint == manifest.fingerprint


def test_everything_downstream_takes_a_subset(scores: Path, tmp_path: Path) -> None:
    some = taken(scores, tmp_path / "some", "tokens > 20")
    fewer = taken(some, tmp_path / "fewer", "tokens > 24")
    build_targets(BuildSettings(fewer, tmp_path / "targets", choose("sft+kl")))
    last = taken(tmp_path / "targets", tmp_path / "last", "tokens != 26")
    wanted = [e.id for e in read_scores(scores) if len(e.input_ids) > 24 and len(e.input_ids) != 26]
    assert [example.id for example in read_targets(last)] == wanted
    assert wanted


def test_targets_of_a_few_rows_of_many_shards(tmp_path: Path) -> None:
    """Most shards of such a subset are empty, and the ids that pack well are told from a sample."""
    folder = seal(
        tmp_path / "many", "score", SCORES, [[random_scored(number)] for number in range(140)]
    )
    some = taken(folder, tmp_path / "some", "supervised_tokens == 7")
    build_targets(BuildSettings(some, tmp_path / "targets", choose("sft+kl")))
    assert list(verify(tmp_path / "targets")) == []


def test_a_second_run_does_nothing_and_another_condition_is_refused(
    scores: Path, tmp_path: Path
) -> None:
    folder = taken(scores, tmp_path / "some", "tokens > 20")
    assert subset(SubsetSettings(scores, folder, None, ("tokens > 20.0",))).was_done
    with pytest.raises(UserError, match=r"settings.subset.where is .* there and .* now"):
        subset(SubsetSettings(scores, folder, None, ("tokens > 21",)))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "mean_trust > 0.5",
            "a folder made by `qpipe score` has no mean_trust: give one of tokens",
        ),
        ("tokens", "is not a condition"),
        ("tokens > many", "is not a condition"),
        ("tokens > nan", "is not a condition"),
        ("tokens ** 2", "is not a condition"),
        ("__import__('os') > 2", "is not a condition"),
        ("tokens > 1000", "none of its 30 rows is selected"),
    ],
)
def test_conditions_that_cannot_be_used(
    scores: Path, tmp_path: Path, where: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        subset(SubsetSettings(scores, tmp_path / "some", None, (where,)))
    assert not (tmp_path / "some" / "manifest.json").exists()


def test_ids_that_are_not_there_are_named(scores: Path, tmp_path: Path) -> None:
    ids = id_file(tmp_path / "ids", "chats.jsonl:1", "zebra", "chats.jsonl:99")
    with pytest.raises(UserError, match=r"2 of its ids are not in .*, the first is chats.jsonl:99"):
        subset(SubsetSettings(scores, tmp_path / "some", ids))
    with pytest.raises(UserError, match="empty: give one id per line"):
        subset(SubsetSettings(scores, tmp_path / "some", id_file(tmp_path / "none")))
    with pytest.raises(UserError, match="no rows are selected"):
        SubsetSettings(scores, tmp_path / "some")


def test_a_row_without_supervised_tokens_has_no_mean() -> None:
    from qpipe.pipeline.format.batches import FlatBatch
    from qpipe.stages.folders.subset import parse_condition

    arrays = {"trust": np.array([0.5, 0.7], np.float32)}
    lengths = {"position": np.array([0, 2]), "token": np.array([3, 5])}
    batch = FlatBatch(["a", "b"], arrays, lengths)
    for text, wanted in (("mean_trust < 2", [False, True]), ("mean_trust != 9", [False, True])):
        condition = parse_condition(text, "build-targets")
        assert condition.holds("build-targets", batch).tolist() == wanted


def test_the_command(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["subset", str(scores), "--out", str(tmp_path / "some"), "--where", "tokens > 20"]
    monkeypatch.setattr("sys.argv", ["qpipe", *words, "mean_nll < 100"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    kept = sum(len(example.input_ids) > 20 for example in read_scores(scores))
    assert f"demonstrations     {kept}" in capsys.readouterr().out


def test_rows_that_are_left_out_are_not_counted_as_weighted(tmp_path: Path) -> None:
    """Else cft would be allowed, and an export refused, for weights that are not there."""
    weighted = replace(random_scored(5), token_weights=np.full(5, 0.5, np.float32))
    folder = seal(
        tmp_path / "all", "score", SCORES, [[random_scored(4), weighted], [random_scored(6)]]
    )
    without = taken(folder, tmp_path / "without", "supervised_tokens != 5")
    assert read_manifest(without).totals["sums"]["weighted"] == 0
    alone = taken(folder, tmp_path / "alone", "supervised_tokens == 5")
    assert read_manifest(alone).totals["sums"]["weighted"] == 5
