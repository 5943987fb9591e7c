"""What a template writes besides the rows, the day and special tokens, is part of the identity."""

import json
import re
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.stages.encoding import template
from qpipe.stages.execution.settings import Execution
from qpipe.stages.score.from_demonstrations import score
from qpipe.stages.score.plan import plan
from qpipe.tests.support.settings import score_settings
from qpipe.trainer.models.files import find_model

DATED = (
    "{{ strftime_now('%d %b %Y %H:%M') }}{% for message in messages %}"
    "{{ message.content + eos_token }}{% endfor %}"
)


class Day(date):
    """The day on which a test believes to run."""

    now = date(2026, 11, 25)

    @classmethod
    def today(cls) -> date:
        return cls.now


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = [{"prompt": f"{number}?", "completion": f"{number}."} for number in range(4)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dated.jinja").write_text(DATED)
    monkeypatch.setattr(template, "date", Day)
    monkeypatch.setattr(Day, "now", date(2026, 11, 25))
    return {
        "model": str(tiny_model),
        "demonstrations": (str(tmp_path / "chats.jsonl"),),
        "template": str(tmp_path / "dated.jinja"),
        "engine": "transformers",
        "top_k": 4,
        "shard_size": 2,
        "out": tmp_path / "scores",
    }


def texts(options: dict[str, Any]) -> list[str]:
    tokenizer = find_model(options["model"]).tokenizer
    return [tokenizer.decode(each.input_ids) for each in read_scores(options["out"])]


def test_a_folder_has_the_day_that_it_was_begun_with(options: dict[str, Any]) -> None:
    score(score_settings(**options), Execution(rank=0, world_size=2))
    Day.now = date(2026, 11, 26)
    score(score_settings(**options))
    assert read_manifest(options["out"]).settings["date"] == "2026-11-25"
    assert [text[:17] for text in texts(options)] == ["25 Nov 2026 00:00"] * 4
    assert getattr(score(score_settings(**options)), "was_done", False)
    other = options | {"out": options["out"].with_name("other")}
    score(score_settings(**other))
    assert texts(other)[0].startswith("26 Nov 2026")


def test_a_day_of_ones_own(options: dict[str, Any]) -> None:
    score(score_settings(**options, date="2024-07-26"))
    assert texts(options)[0].startswith("26 Jul 2024 00:00")
    with pytest.raises(UserError, match=r'settings.date is "2024-07-26" there and "2026-11-25"'):
        score(score_settings(**options, date="2026-11-25"))
    assert getattr(score(score_settings(**options)), "was_done", False)


def test_a_store_is_told_the_day(options: dict[str, Any]) -> None:
    """Each day would make a folder of its own, also in the middle of the night."""
    store = options | {"out": options["out"].with_name("store"), "in_store": True}
    with pytest.raises(UserError, match=r"--store: .*: give a date, as in --date 2026-11-25$"):
        score(score_settings(**store))
    assert not store["out"].exists()
    score(score_settings(**store, date="2026-11-25"), Execution(rank=0, world_size=2))
    Day.now = date(2026, 11, 26)
    score(score_settings(**store, date="2026-11-25"))
    (folder,) = store["out"].iterdir()
    assert read_manifest(folder).settings["date"] == "2026-11-25"


def test_a_plan_reads_no_folder(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one either that it is asked for in, which may hold any manifest.json."""
    monkeypatch.chdir(tmp_path)
    Path("manifest.json").write_text('{"name": "an extension of a browser"}')
    assert plan(score_settings(**options | {"out": Path()})).workload.read == 4


def test_days_for_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--date 2024-13-01: not a date: give one as in 2026-11-25"):
        score_settings(**options, date="2024-13-01")
    plain = options | {"template": "none"}
    with pytest.raises(UserError, match="--date 2024-07-26: the template writes no date"):
        score(score_settings(**plain, date="2024-07-26"))
    score(score_settings(**plain))
    assert "date" not in read_manifest(options["out"]).settings


@pytest.mark.parametrize("template", ["none", "dated.jinja"])
def test_other_special_tokens_are_another_folder(
    options: dict[str, Any], tmp_path: Path, template: str
) -> None:
    """They stand in a file of their own beside tokenizer.json, whose hash stays the same."""
    if template == "none":
        options["template"] = template
    score(score_settings(**options), Execution(rank=0, world_size=2))
    first = find_model(options["model"])
    shutil.copytree(options["model"], tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(
        re.sub(r'("eos_token": )"[^"]*"', r'\1"<|im_start|>"', path.read_text(), count=1)
    )
    second = find_model(str(tmp_path / "model"))
    assert second.tokenizer_hash == first.tokenizer_hash
    assert second.tokenizer.eos_token != first.tokenizer.eos_token
    with pytest.raises(UserError, match=r"special_tokens.eos_token is .* there and .* now"):
        score(score_settings(**options | {"model": str(tmp_path / "model")}))
