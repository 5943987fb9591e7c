"""`qpipe score --precision uint16` and `--top-p`: what the folder holds and who reads it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.stages.folders.settings import SubsetSettings
from qpipe.stages.folders.subset import subset
from qpipe.stages.folders.verify import verify
from qpipe.stages.score.from_demonstrations import score
from qpipe.stages.score.from_folder import score_at
from qpipe.tests.support.settings import score_settings


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"{number}?", "completion": f"It is {number}."} for number in range(3)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": str(tiny_model),
        "engine": "transformers",
        "top_k": 32,
        "demonstrations": (str(tmp_path / "chats.jsonl"),),
        "template": "none",
        "shard_size": 2,
    }


def test_packed_scores_are_the_plain_ones_in_fewer_bytes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    score(score_settings(**options, out=plain))
    score(score_settings(**options, out=packed, precision="uint16"))
    assert read_manifest(packed).settings["precision"] == "uint16"
    assert "precision" not in read_manifest(plain).settings
    assert list(verify(packed)) == []
    for one, other in zip(read_scores(plain), read_scores(packed), strict=True):
        np.testing.assert_array_equal(one.topk_ids, other.topk_ids)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=0.021)
    subset(SubsetSettings(packed, tmp_path / "some", where=("tokens > 0",)))
    some = list(read_scores(tmp_path / "some"))
    for one, other in zip(read_scores(packed), some, strict=True):
        np.testing.assert_array_equal(one.topk_log_probs, other.topk_log_probs)
    at = {name: options[name] for name in ("model", "engine", "top_k")}
    score_at(score_settings(**at, at=packed, out=tmp_path / "teacher", precision="uint16"))
    for one, other in zip(read_scores(packed), read_scores(tmp_path / "teacher"), strict=True):
        np.testing.assert_array_equal(one.topk_ids, other.topk_ids)


def test_a_mass_cuts_the_entries(options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "scores"
    manifest = score(score_settings(**options, out=out, top_p=0.3)).manifest  # type: ignore
    assert manifest.settings["top_p"] == 0.3
    assert manifest.totals["entries"] < 32 * manifest.totals["positions"]
    assert list(verify(out)) == []
    with pytest.raises(UserError, match=r"--top-p 0\.3: would drop ids that --at asks for"):
        score_settings(model="m", at=out, out=tmp_path / "teacher", top_p=0.3)
    with pytest.raises(UserError, match="--top-p"):
        score_settings(**options, out=out, top_p=0.0)
