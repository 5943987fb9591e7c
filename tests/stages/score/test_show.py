"""`score --show`: demonstrations as text, with what is supervised marked."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from qpipe.stages.cli import cli

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path) -> list[str]:
    """The command about four rows, of which the second is rejected and the third has weights."""
    user = {"role": "user", "content": "a?"}
    answer = {"role": "assistant", "content": "One."}
    rows = [
        {"id": "first", "messages": [user, answer]},
        {"messages": [user]},
        {"id": "third", "messages": [user, answer | {"weight": 0.5}, user, answer]},
        {"id": "fourth", "messages": [user, answer]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    named = {
        "--model": tiny_model,
        "--demonstrations": tmp_path / "x.jsonl",
        "--template": tmp_path / "chatml.jinja",
    }
    return ["score", *[str(word) for pair in named.items() for word in pair]]


def test_the_first_rows_are_shown(words: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, [*words, "--show", "3"])
    assert result.exit_code == 0, result.output
    first, third, second = result.stdout.rstrip().split("\n\n")
    assert first.splitlines()[1:] == [
        "<|im_start|>user",
        "a?<|im_end|>",
        "<|im_start|>assistant",
        "⟦One.<|im_end|>⟧",
    ]
    assert first.splitlines()[0].startswith("first: ")
    assert "⟦0.5: One.<|im_end|>⟧" in third
    assert third.endswith("⟦One.<|im_end|>⟧")
    assert second == "x.jsonl, line 2: rejected: no assistant message"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chatml.jinja", "x.jsonl"]


def test_with_the_plan(words: list[str]) -> None:
    result = CliRunner().invoke(cli, [*words, "--show", "1", "--plan"])
    assert result.exit_code == 0, result.output
    assert result.stdout.index("⟦One.") < result.stdout.index("4 read, 3 to score, 1 rejected")


def test_it_is_of_demonstrations(words: list[str]) -> None:
    result = CliRunner().invoke(cli, [*words, "--show", "1", "--at", "scores"])
    assert result.exit_code == 2
    assert "--show requires --demonstrations FILE and excludes --at" in result.output
    assert CliRunner().invoke(cli, [*words, "--show", "0"]).exit_code == 2
