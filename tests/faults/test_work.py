"""The judge of the other tests finds what there is to find."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from qpipe.tests.faults.work import Work, items, problems


def test_every_demonstration_is_accounted_for(works: Mapping[str, Work]) -> None:
    scores = items(works["score"].undisturbed)
    assert len(scores) == len(set(scores)) == 47
    assert sum("no known form" in each or "empty" in each for each in scores) >= 1
    assert len(items(works["build-targets"].undisturbed)) == 45


def test_a_folder_is_judged(works: Mapping[str, Work], tmp_path: Path) -> None:
    scores, out = works["score"].undisturbed, tmp_path / "score"
    shutil.copytree(scores, out)
    assert not any(problems(out, scores).values())
    (out / ".shard-00001.arrow.0a1b.tmp").write_bytes(b"")
    rejects = (out / "rejects.jsonl").read_text().splitlines(keepends=True)
    (out / "rejects.jsonl").write_text(rejects[0] * 2)
    found = problems(out, scores)
    assert found["left over"] == [".shard-00001.arrow.0a1b.tmp"]
    assert found["wrong"] == ["rejects.jsonl"]
    assert (len(found["lost"]), len(found["duplicated"])) == (1, 1)


def test_a_training_is_judged(works: Mapping[str, Work], tmp_path: Path) -> None:
    run, out = works["train"].undisturbed, tmp_path / "train"
    shutil.copytree(run, out)
    *lines, last = (out / "log.jsonl").read_text().splitlines()
    changed = json.dumps(json.loads(lines[3]) | {"tokens_per_second": 1.0})
    (out / "log.jsonl").write_text("\n".join([*lines[:3], changed, *lines[4:], last]) + "\n")
    (out / "checkpoints").mkdir()
    assert problems(out, run) == {
        "lost": [], "duplicated": [], "wrong": [], "left over": ["checkpoints"],
    }  # fmt: skip
    changed = json.dumps(json.loads(lines[3]) | {"loss": 1.0})
    (out / "log.jsonl").write_text("\n".join([*lines[:3], changed, *lines[4:]]) + "\n")
    found = problems(out, run)
    assert found["wrong"] == ["log.jsonl"]
    assert len(found["lost"]) == 1
