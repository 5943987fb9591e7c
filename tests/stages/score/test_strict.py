"""`qpipe score --strict` also holds for what was scored without it."""

import json
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.stages.execution.settings import Execution
from qpipe.stages.score.from_demonstrations import score
from qpipe.tests.support.settings import score_settings


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Two shards of two rows; the last row cannot be used."""
    rows = [{"prompt": f"{number}?", "completion": f"{number}."} for number in range(3)]
    lines = [json.dumps(row) for row in [*rows, {"text": "?"}]]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return {
        "model": str(tiny_model),
        "demonstrations": (str(tmp_path / "chats.jsonl"),),
        "engine": "transformers",
        "template": "none",
        "top_k": 4,
        "shard_size": 2,
        "out": tmp_path / "scores",
    }


@pytest.mark.parametrize("rank", [None, 1])
def test_a_row_rejected_before_is_refused(options: dict[str, Any], rank: int | None) -> None:
    """Of a sealed folder, and of one that another task is to go on with."""
    world_size = None if rank is None else 2
    score(score_settings(**options), Execution(rank=rank, world_size=world_size))
    assert (options["out"] / "manifest.json").exists() == (rank is None)
    with pytest.raises(
        UserError, match=r"chats\.jsonl, line 4: no known format, .*: correct it, or"
    ):
        score(score_settings(**options, strict=True))


def test_a_sealed_folder_is_judged_by_its_manifest(options: dict[str, Any]) -> None:
    """Its sidecars, one request each in a bucket, are not looked at."""
    score(score_settings(**options))
    for path in options["out"].glob("shard-*.json"):
        path.unlink()
    with pytest.raises(UserError, match="line 4: no known format"):
        score(score_settings(**options, strict=True))


def test_another_folder_is_called_that_first(options: dict[str, Any]) -> None:
    score(score_settings(**options))
    with pytest.raises(UserError, match="top_k is 4 there and 5 now"):
        score(score_settings(**options | {"top_k": 5}, strict=True))
