"""The runner reports what a part measured, also of parts that fail or take too long."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qpipe.tests.gpu import run
from qpipe.tests.gpu.parts import Part, known_parts

_ENDINGS = {"whole": "", "failing": "raise ValueError('a reason')", "slow": "time.sleep(60)"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """Of a part that ends, one that fails and one that is stopped, each with a row before that."""
    monkeypatch.setattr(run, "_STOPPING", 0.2)
    found = {}
    for name, ending in _ENDINGS.items():
        row = json.dumps({"what": "speed", "value": 1234.5, "unit": "tokens/s"})
        code = f"import time; open({f'{tmp_path / name}.jsonl'!r}, 'w').write({row!r}); {ending}"
        monkeypatch.setattr(
            run, "part_words", lambda *_, code=code: [run.sys.executable, "-c", code]
        )
        limit = 2 if name == "slow" else 60
        found[name] = run.run_part(name, Part(name, _nothing, limit), tmp_path, False, 100.0)
    return found


def _nothing(_: object) -> Iterator[Any]:
    yield from ()


def test_each_ending_is_reported_with_what_was_measured(
    results: dict[str, dict[str, object]],
) -> None:
    assert results["whole"]["ended"] == "done"
    assert results["failing"]["ended"] == "failed with status 1: ValueError: a reason"
    assert str(results["slow"]["ended"]).startswith("stopped after")
    rows = [{"what": "speed", "value": 1234.5, "unit": "tokens/s"}]
    assert [result["rows"] for result in results.values()] == [rows] * 3


def test_the_page_shows_values_and_what_is_open(results: dict[str, dict[str, object]]) -> None:
    machine = {"machine": "a GPU"}
    parts = {name: Part(f"about {name}", _nothing, 1) for name in _ENDINGS}
    page = "\n".join(
        run.page_lines({name: machine | result for name, result in results.items()}, parts)
    )
    assert page.count("| speed | 1,234 tokens/s |") == 3
    assert page.count("This part is open") == 2
    assert "Machine: a GPU." in page
    assert "## About whole" in page


def test_a_part_without_time_is_not_started(tmp_path: Path) -> None:
    result = run.run_part("late", Part("late", _nothing, 60), tmp_path, False, 1.0)
    assert result["ended"] == "not run: the time was used up"


def test_parts_have_distinct_names() -> None:
    assert {"score-8b", "alignment", "score-0.6b"} <= set(known_parts())


@pytest.mark.slow
def test_scoring_rehearses(tmp_path: Path) -> None:
    """The scoring parts run to their end on the CPU, and the scores of all forms agree."""
    pytest.importorskip("vllm")
    parts = ["score-0.6b", "alignment", "alignment-float32", "rows", "apart-2048"]
    words = [
        sys.executable,
        f"{run.ROOT / 'tests' / 'gpu' / 'run.py'}",
        f"{tmp_path}",
        "--rehearse",
    ]
    done = subprocess.run([*words, *parts, "--minutes", "60"], check=False)
    assert done.returncode == 0
    results = run.read_results(tmp_path)
    assert {name: result["ended"] for name, result in results.items()} == dict.fromkeys(
        parts, "done"
    )
    rows = [row for result in results.values() for row in result["rows"]]
    differences = [row["value"] for row in rows if row["unit"] == "nats"]
    assert len(differences) >= 8
    assert max(map(abs, differences)) < 1e-3
