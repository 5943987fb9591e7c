"""`qpipe inspect` as it is used."""

import json
import re
from pathlib import Path

import pytest
from qpipe.stages.commands.inspect_summary import ink, sparkline, use_colour
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import scored, targeted
from qpipe.tests.support.folders import folder_of

IDS = [0, 7, 8]


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    rows = [
        targeted(f"demo-{i}", IDS, [i / 10, 1.0], [{7: 0.5, 9: 0.5}, {8: 1.0}]) for i in range(6)
    ]
    return folder_of(tmp_path / "targets", rows, shards=2)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    rows = [
        scored(f"demo-{i}", IDS, [{9: 0.9 - i / 10, 7: 0.1 + i / 10}, {8: 1.0}]) for i in range(6)
    ]
    return folder_of(tmp_path / "scores", rows)


def shown(output: str) -> list[str]:
    """The ids of the examples that were shown."""
    return re.findall(r"^── (\S+)", output, re.MULTILINE)


def test_a_summary_and_the_first_examples(targets: Path) -> None:
    output = qpipe("inspect", targets)
    assert "6, 0 rejected" in output
    assert "18, 12 supervised" in output
    assert re.search(r"Trust γ +0\.625 +0 +1 ", output)
    assert shown(output) == ["demo-0", "demo-1", "demo-2"]
    assert "\x1b" not in output
    assert "⟨0⟩⟨7⟩₉⟨8⟩" in output  # trust 0 stands out, trust 1 does not


def test_trust_that_is_the_same_everywhere_colours_nothing(tmp_path: Path) -> None:
    rows = [targeted("demo", IDS, [0.5, 0.5], [{7: 0.2, 9: 0.8}, {8: 1.0}])]
    targets = folder_of(tmp_path / "targets", rows)
    assert "⟨0⟩⟨7⟩₄⟨8⟩\n" in qpipe("inspect", targets)  # Q(7) = 0.6, Q(8) = 1
    scores = folder_of(tmp_path / "scores", [scored("demo", IDS, [{7: 0.2, 9: 0.8}, {8: 1.0}])])
    assert "⟨0⟩⟨7⟩₈⟨8⟩\n" in qpipe("inspect", targets, "--scores", scores)  # b(7) = 0.2


def test_examples_by_statistic_by_id_and_at_random(targets: Path, scores: Path) -> None:
    assert shown(qpipe("inspect", targets, "--sort", "lowest-trust", "-n", 2)) == [
        "demo-0",
        "demo-1",
    ]
    assert shown(qpipe("inspect", targets, "--sort", "highest-trust", "-n", 1)) == ["demo-5"]
    assert shown(qpipe("inspect", targets, "--id", "demo-4", "demo-2")) == ["demo-2", "demo-4"]
    drawn = [qpipe("inspect", targets, "--random", 3, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(shown(drawn[0])) == 3
    by_kl = qpipe("inspect", targets, "--scores", scores, "--sort", "largest-kl", "-n", 6)
    assert sorted(shown(by_kl)) == [f"demo-{i}" for i in range(6)]
    means = [float(each) for each in re.findall(r"KL (\S+)$", by_kl, re.MULTILINE)]
    assert means == sorted(means, reverse=True)


def test_two_folders_show_where_they_differ_most(targets: Path, tmp_path: Path) -> None:
    rows = [
        targeted(f"demo-{i}", IDS, [0.9 if i == 3 else i / 10, 1.0], [{7: 0.5, 9: 0.5}, {8: 1.0}])
        for i in range(6)
    ]
    other = folder_of(tmp_path / "other", rows)
    output = qpipe("inspect", targets, "--against", other, "-n", 1, "--alternatives", 2)
    assert shown(output) == ["demo-3"]
    assert "⟨0⟩⟨7⟩₃⟨8⟩\n" in output  # what differs is marked, by how much
    assert "⟨7⟩ 65.0%  ⟨9⟩ 35.0%" in output
    assert "⟨7⟩ 95.0%  ⟨9⟩ 5.0%" in output
    found = json.loads(qpipe("inspect", targets, "--against", other, "-n", 1, "--json"))
    (example,) = found["examples"]
    assert example["tokens"][1]["tv"] == pytest.approx(0.3)
    assert found["summary"]["measures"]["tv"]["mean"] == pytest.approx(0.3 / 12)
    assert found["folder"]["examples"] == 6


def test_colours_on_request_and_never_with_no_color(
    targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured = qpipe("inspect", targets, "--color")
    assert "\x1b[48;5;166m⟨7⟩\x1b[0m⟨8⟩" in coloured  # trust 0 stands out, trust 1 does not
    assert "\x1b" not in qpipe("inspect", targets, "--no-color")
    assert use_colour(True)
    assert not use_colour(None)  # no terminal here
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert use_colour(None)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colour(None)


def test_a_demonstration_cannot_write_to_the_terminal(tmp_path: Path, tiny_model: Path) -> None:
    from qpipe.pipeline.folders.provenance import tokenizer_hash
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("is \x1b]0;owned\x07\x1b[2J\u202e", add_special_tokens=False)["input_ids"]
    rows = [targeted("\x1b[2Jid\n── b", ids, [0.5] * (len(ids) - 1), [{t: 1.0} for t in ids[1:]])]
    folder = folder_of(tmp_path / "t", rows, tokenizer_hash=tokenizer_hash(tokenizer))
    output = qpipe("inspect", folder, "--model", tiny_model, "--alternatives", 1)
    assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", output) == []
    assert "\\x1b" in output
    assert shown(output) == ["\\x1b[2Jid↵──"]
    escapes = qpipe("inspect", folder, "--model", tiny_model, "--color")
    assert re.findall(r"\x1b(?!\[[0-9;]*m)", escapes) == []  # colours alone


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--id", "nobody"], "--id nobody: no such example"),
        (["--sort", "trust"], "--sort trust: give lowest- or highest-"),
        (["--sort", "largest-kl"], "--sort kl: .* does not have it: give --scores or --against"),
        (["--colour-by", "charm"], "--colour-by charm: give one of trust"),
        (["--sort", "lowest-trust", "--random", "2"], "--random and --sort exclude each other"),
        (["--random", "2", "-n", "5"], "-n 5: cannot be combined with --random, which"),
        (["--scores", "nowhere"], "nowhere: no such folder"),
        (["--model", "/nowhere"], "--model /nowhere: no such folder"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    targets: Path, words: list[str], error: str
) -> None:
    assert re.search(error, qpipe("inspect", targets, *words, fails=True))


def test_how_strongly_a_value_is_coloured() -> None:
    assert ink("share", 1.0) == 0 == ink("nats", 0.0) == ink("rank", 1)
    assert ink("share", 0.0) == 1 == ink("nats", 4.0) == ink("rank", 5000)
    assert (ink("distance", 0.0), ink("distance", 0.25)) == (0, 0.25)
    assert ink("rank", 10) == pytest.approx(1 / 3)
    assert ink("difference", -0.5) == -0.5


def test_a_histogram_on_one_line() -> None:
    assert sparkline([0, 1, 50, 100]) == " ▁▅█"
