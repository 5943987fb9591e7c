"""What the commands print when they are done."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.shard_run import StageResult
from qpipe.pipeline.format.records import Reject, ScoredExample
from qpipe.pipeline.methods import METHODS, choose
from qpipe.pipeline.targets.ceiling import Ceiling
from qpipe.stages.build_targets.compare_methods import Comparison
from qpipe.stages.commands.ceiling_summary import print_comparison
from qpipe.stages.commands.folder_summary import print_scores
from qpipe.stages.commands.methods import methods
from qpipe.stages.commands.tables import print_table
from qpipe.tests.support.commands import run_qpipe
from qpipe.tests.support.examples import of_probs
from qpipe.tests.support.folders import seal_shards

pytestmark = pytest.mark.usefixtures("no_sync")

# the base at a position: token 0 is its mode in the first, and token 1 far from it in the second
KNOWN, STRANGE, BETWEEN = [0.6, 0.2, 0.15, 0.05], [0.9, 0.04, 0.03, 0.03], [0.5, 0.25, 0.2, 0.05]


def score_folder(folder: Path, rows: Sequence[ScoredExample], top_k: int = 4) -> Path:
    """The examples in one shard, and two rejects."""
    sealed(folder, rows, top_k)
    return folder


def sealed(folder: Path, rows: Sequence[ScoredExample], top_k: int = 4) -> StageResult:
    return seal_shards(
        folder,
        "score",
        {"vocab_size": 4, "tokenizer_hash": "3fa9", "top_k": top_k},
        [list(rows)],
        rejects=[Reject("chats.jsonl", line, "empty") for line in (3, 8)],
        sums_of=lambda rows: {
            "cut": 1,
            "weighted": 0,
            "tail_mass": sum(float(row.tail_mass.sum()) for row in rows),
            "observed_nll": sum(float(-row.observed_log_probs.sum()) for row in rows),
        },
    )


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Three tokens of two demonstrations, b(y) 0.6, 0.04 and 0.25."""
    rows = [of_probs("a", [KNOWN, STRANGE], [0, 1], 4), of_probs("b", [BETWEEN], [1], 4)]
    return score_folder(tmp_path / "scores", rows)


@dataclass(frozen=True)
class Printed:
    """What a command printed."""

    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.err.splitlines() if "Warning" in line]

    def value(self, name: str) -> str:
        """The value of a line of the summary."""
        [found] = [line for line in self.lines if line.startswith(name + "  ")]
        return found.removeprefix(name).strip()

    @property
    def ceiling(self) -> list[list[str]]:
        """The cells of the ceiling's table."""
        [start] = [n for n, line in enumerate(self.lines) if line.startswith("What these targets")]
        return [cells(line) for line in self.lines[start + 1 : start + 8]]


def qpipe(*words: object) -> Printed:
    """What a command prints that succeeds."""
    done = run_qpipe(*words)
    assert done.status == 0, done.err
    return Printed(done.out, done.err)


def cells(line: str) -> list[str]:
    return re.split(r"  +", line)


# Targets


def test_targets_are_summed_up(scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "targets"
    ran = qpipe("build-targets", "--scores", scores, "--out", out, "--method", "dft")

    assert ran.value("targets") == str(out)
    assert ran.value("method") == "dft (frozen-target)"
    assert ran.value("supervised tokens") == "3"
    assert ran.value("mean trust") == f"{(0.6 + 0.04 + 0.25) / 3:.4f}"
    assert ran.value("mean support") == "4.0 entries"
    assert ran.value("kept mass") == "1.0000"
    size = (out / "shard-00000.arrow").stat().st_size
    assert ran.value("bytes a token") == f"{size / 3:.1f}"
    assert re.fullmatch(r"[\d,]+ supervised tokens/s", ran.value("speed"))
    assert "bound" not in ran.out


def test_the_ceiling_is_printed_overall_and_by_the_bases_probability(
    scores: Path, tmp_path: Path
) -> None:
    ran = qpipe("build-targets", "--scores", scores, "--out", tmp_path / "t", "--method", "dft")

    def row(name: str, *base: float, mode: str, starved: str) -> list[str]:
        """γ = b(y) and the residual is the base."""
        targets = [b + (1 - b) * b for b in base]
        nll = -sum(map(math.log, targets)) / len(base)
        divergence = sum(
            q * math.log(q / b) + (1 - q) * math.log((1 - q) / (1 - b))
            for q, b in zip(targets, base, strict=True)
        ) / len(base)
        return [name, str(len(base)), f"{nll:.4f}", mode, starved, f"{divergence:.4f}"]

    assert ran.ceiling == [
        ["b(y)", "tokens", "-log Q(y)", "Q's mode is y", "γ < 0.05", "KL from base"],
        # 0.4375 is more than 0.75·0.5, 0.0784 is less than 0.96·0.9
        row("all", 0.6, 0.04, 0.25, mode="66.7%", starved="33.3%"),
        ["0 to 0.01", "0"],
        row("0.01 to 0.1", 0.04, mode="0.0%", starved="100.0%"),
        row("0.1 to 0.5", 0.25, mode="100.0%", starved="0.0%"),
        row("0.5 to 0.9", 0.6, mode="100.0%", starved="0.0%"),
        ["0.9 to 1", "0"],
    ]
    assert ran.lines[-1] == "Demonstrations that greedy decoding of Q writes: 50.0%"
    assert "What these targets can teach at best" in ran.lines


def test_the_ceiling_of_a_live_form_is_that_of_the_start(scores: Path, tmp_path: Path) -> None:
    ran = qpipe(
        "build-targets", "--scores", scores, "--out", tmp_path / "t", "--method", "dft",
        "--form", "live",
    )  # fmt: skip

    head = "What these targets can teach at best (at the start, where the student is the base)"
    assert head in ran.lines
    assert ran.ceiling[1][3:5] == ["66.7%", "33.3%"]
    assert "kept mass" not in ran.out  # nothing of a residual is stored


def test_a_method_without_a_target_has_no_ceiling(scores: Path, tmp_path: Path) -> None:
    ran = qpipe("build-targets", "--scores", scores, "--out", tmp_path / "t", "--method", "gem")

    assert ran.value("method") == "gem (live, beta=0.7, h=linear)"
    assert "at best" not in ran.out
    assert "greedy" not in ran.out
    assert ran.warnings == []


def test_parameters_are_printed_with_what_the_data_set_decided(
    scores: Path, tmp_path: Path
) -> None:
    ran = qpipe("build-targets", "--scores", scores, "--out", tmp_path / "t", "--method", "flow")
    assert ran.value("method") == f"flow (frozen-weight, tau={math.log(4):.6g})"


def test_a_temperature_is_printed_with_how_far_off_it_may_be(tmp_path: Path) -> None:
    rows = [of_probs("a", [KNOWN, STRANGE], [0, 1], top_k=2)]
    folder = score_folder(tmp_path / "scores", rows, top_k=2)
    ran = qpipe(
        "build-targets", "--scores", folder, "--teacher", folder, "--out", tmp_path / "t",
        "--temperature", 2, "--teacher-temperature", 0.5,
    )  # fmt: skip

    sums = read_manifest(tmp_path / "t").totals["sums"]
    for name, key in (
        ("temperature bound", "temperature_bound"),
        ("teacher's bound", "teacher_temperature_bound"),
    ):
        assert sums[key] > 0
        assert ran.value(name) == f"{sums[key] / 2:.2g} (total variation)"


def test_a_second_run_prints_the_same_and_that_there_was_nothing_to_do(
    scores: Path, tmp_path: Path
) -> None:
    command = ("build-targets", "--scores", scores, "--out", tmp_path / "t", "--method", "dft")
    first, second = qpipe(*command), qpipe(*command)

    assert second.value("targets") == f"{tmp_path / 't'}  (was there already, nothing to do)"
    kept = [line for line in first.lines[1:] if not line.startswith("speed")]
    assert second.lines[1:] == kept
    assert second.warnings == first.warnings


# The warning


@pytest.mark.parametrize(
    ("demonstrations", "mode", "whole"),
    [
        (["11", "11"], None, None),
        (["11", "0"], None, None),  # two thirds of the tokens and half of the demonstrations
        (["1", "0"], 50, 50),  # too few tokens
        (["11111", "10", "10"], 22, 67),  # enough tokens, too few demonstrations
        (["1", "1", "1", "000"], 50, 25),  # enough demonstrations, too few tokens
        (["111", "10"], None, None),
        (["1110"], 25, 100),
        (["00", "0"], 100, 100),
    ],
)
def test_a_warning_comes_exactly_where_little_can_be_learnt(
    tmp_path: Path,
    demonstrations: list[str],
    mode: int | None,
    whole: int | None,
) -> None:
    """A 1 is a token that its target puts first, a 0 one that it does not."""
    rows = [
        of_probs(
            str(number),
            [KNOWN if each == "1" else STRANGE for each in letters],
            [0 if each == "1" else 1 for each in letters],
            4,
        )
        for number, letters in enumerate(demonstrations)
    ]
    folder = score_folder(tmp_path / "scores", rows)

    ran = qpipe("build-targets", "--scores", folder, "--out", tmp_path / "t", "--method", "dft")

    assert "Warning" not in ran.out
    written = sum("0" not in letters for letters in demonstrations) / len(demonstrations)
    assert ran.lines[-1].endswith(f" {written:.1%}")
    if mode is None:
        assert ran.warnings == []
        return
    [line] = ran.warnings
    assert line.startswith("Warning: another token than the observed one is the target's mode at ")
    assert f"at {mode}% of the tokens, and {whole}% of the demonstrations" in line
    assert "--method sft+kl" in line
    again = qpipe(
        "build-targets", "--scores", folder, "--out", tmp_path / "s", "--method", "sft+kl"
    )
    assert again.warnings == []


def test_the_ceiling_of_a_divergence_is_that_of_its_end(scores: Path, tmp_path: Path) -> None:
    build = ("build-targets", "--scores", scores, "--teacher", scores)
    jsd = qpipe(*build, "--method", "jsd", "--out", tmp_path / "jsd")
    kd = qpipe(*build, "--method", "kd", "--out", tmp_path / "kd")

    head = "What these targets can teach at best"
    assert f"{head} (at the end, where the student is the teacher)" in jsd.lines
    assert jsd.out.partition("\nb(y)")[2] == kd.out.partition("\nb(y)")[2] != ""


# Comparisons


def test_a_comparison_is_a_table_and_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(
        rows=[
            (choose("sft+kl"), Ceiling("all", 3, 0.06971, 1.0, 0.0, 2.32466), 1.0),
            (choose("dft", "live"), Ceiling("all", 3, 2.26, 0.45454, 0.4849, 0.044), 0.41666),
        ],
        left_out={"needs a teacher": ["kd", "contrast"], "has no target distribution": ["gem"]},
        positions=1234567,
        examples=1000,
    )

    print_comparison(comparison)

    assert capsys.readouterr().out == (
        "method  form           -log Q(y)  Q's mode is y  demos   γ < 0.05  KL from base\n"
        "sft+kl  frozen-target  0.0697     100.0%         100.0%  0.0%      2.3247\n"
        "dft     live           2.2600     45.5%          41.7%   48.5%     0.0440\n"
        "\n"
        "1,234,567 supervised tokens of 1,000 demonstrations. demos: how many greedy decoding of "
        "Q writes.\n"
        "A live form is shown as it starts, where the student is the base; a divergence as it "
        "ends, where the student is the teacher.\n"
        "Q(y) below 1e-10 counts as 1e-10. The ids that are not stored count as one in the KL, "
        "which is then too low.\n"
        "Advice: of the 1 that can teach most demonstrations, sft+kl (frozen-target) stays nearest "
        "to the base, 2.3 nats a token, and can teach 100% of them; the last 1 cannot teach half "
        "of them.\n"
        "Left out, needs a teacher: kd, contrast.\n"
        "Left out, has no target distribution: gem.\n"
    )


def test_compare_methods_prints_its_comparison(scores: Path) -> None:
    ran = qpipe("compare-methods", scores)

    rows = {line.split()[0]: cells(line) for line in ran.lines if line}
    assert rows["sft"][1:5] == ["frozen-target", "0.0000", "100.0%", "100.0%"]
    assert rows["dft"][1] == "frozen-target"
    assert rows["dft"][3:6] == ["66.7%", "50.0%", "33.3%"]
    assert "3 supervised tokens of 2 demonstrations." in ran.out
    assert (
        "Left out, needs a teacher: kd, kd-hybrid, target-sft, reverse-kl, mixed-kl, jsd, skew-kl, "
        "skew-reverse-kl, token-cleaning, contrast, se-kd, tip, amid." in ran.lines
    )
    assert ran.warnings == []


# The table of methods


def test_methods_are_printed_whole() -> None:
    blocks = methods_of(qpipe("methods").out)

    assert list(blocks) == list(METHODS)
    assert blocks["sft"] == [
        "sft  (maximum likelihood)",
        "    γ = 1",
        "    forms: frozen-target, frozen-weight, live",
    ]
    assert blocks["asft"] == [
        "asft  (arXiv 2509.23753)",
        "    γ = p_y/(p_y+lam)   π̃ b   s = p_y+lam",
        "    parameters: lam=0.1 (0 to 1e+06)",
        "    forms: frozen-target, live",
        "    needs: b",
    ]
    assert blocks["token-cleaning"] == [
        "token-cleaning  (arXiv 2502.01968)",
        "    γ = 1 if log(q_y/b_y) >= threshold, else 0   π̃ p",
        "    parameters: keep=0.6 (0 to 1), threshold=of the data (-1e+06 to 1e+06)",
        "    forms: frozen-weight, frozen-target, live",
        "    needs: frozen-weight: a weight + --teacher; frozen-target: b + --teacher; "
        "live: a weight + --teacher",
    ]
    assert blocks["target-sft"] == [
        "target-sft  (arXiv 2606.11189)",
        "    γ = p_y   π̃ ~ p^(1-eta) q^eta",
        "    parameters: eta=0.5 (0 to 1)",
        "    forms: frozen-target, live",
        "    needs: frozen-target: b^(1-eta) q^eta + --teacher; live: q + --teacher",
    ]
    assert blocks["iw-sft"][1] == "    γ = 1   s = min(16, exp(T mean_t log(p_y/b_y)))"
    assert blocks["iw-sft"][-1] == "    needs: b_y"
    assert (
        "    parameters: beta=0.7 (above 0, to 1e+06), h=linear (one of linear, logsigmoid)"
        in (blocks["gem"])
    )
    assert any("a mask with the demonstrations" in line for line in blocks["cft"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_printed_with_all_that_it_has(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    methods.main([], standalone_mode=False)
    method, lines = METHODS[name], methods_of(capsys.readouterr().out)[name]

    head, formula, *rest = lines
    assert head == f"{name}  ({method.source})"
    words = {"student": "p", "base": "b", "teacher": "q", "uniform": "1/V"}
    target = f"    γ = {method.trust.formula}"
    if method.residual in words:
        target += f"   π̃ {words[method.residual]}"
    assert formula.startswith(target)
    assert (f"   s = {method.scale.formula}" in formula) == (method.scale.formula != "1")
    named = dict(line.strip().split(": ", 1) for line in rest)
    assert named["forms"] == ", ".join(method.forms)
    assert ("parameters" in named) == bool(method.parameters)
    for each in method.parameters:
        default = "of the data" if each.default is None else f"{each.default}".removesuffix(".0")
        assert f"{each.name}={default} ({each.allowed})" in named["parameters"]
    needs_teacher = any(choose(name, form).needs_teacher for form in method.forms)
    assert ("--teacher" in named.get("needs", "")) == needs_teacher


def methods_of(text: str) -> dict[str, list[str]]:
    """The lines of each method."""
    blocks: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            blocks[line.split("  (")[0]] = []
        blocks[list(blocks)[-1]].append(line)
    return blocks


# The rest


def test_a_tables_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("a", "long one", "x"), ("longer", "b", ""), ("c", "", "γ")])
    assert capsys.readouterr().out == (
        "a       long one  x\n"  # two blanks between columns
        "longer  b\n"
        "c                 γ\n"
    )


def test_scores_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [of_probs("a", [KNOWN, STRANGE], [0, 1], 2), of_probs("b", [BETWEEN], [1], 2)]
    result = sealed(tmp_path / "scores", rows, top_k=2)

    print_scores(tmp_path / "scores", result)

    lines = dict(
        re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()
    )
    assert lines["scores"] == str(tmp_path / "scores")
    rejects = tmp_path / "scores" / "rejects.jsonl"
    assert lines["demonstrations"] == f"4 read, 2 scored, 2 rejected (see {rejects})"
    assert lines[""] == "1 of them cut to the limit"
    assert lines["supervised tokens"] == "3"
    assert lines["kept mass"] == f"{(0.8 + 0.94 + 0.75) / 3:.4f}"
    assert lines["mean loss"] == f"{-math.log(0.6 * 0.04 * 0.25) / 3:.4f} nats"


def test_what_a_run_does_is_appended_as_json_lines(scores: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "earlier"}\n')
    command = ("build-targets", "--scores", scores, "--out", tmp_path / "t", "--log-json", log)
    qpipe(*command)
    qpipe(*command)

    earlier, start, shard, first, second = map(json.loads, log.read_text().splitlines())
    manifest: Any = read_manifest(tmp_path / "t")
    assert earlier == {"event": "earlier"}
    assert (start["event"], start["shards"], start["committed"]) == ("start", 1, 0)
    (entry,) = manifest.shards
    assert (shard["event"], shard["index"], shard["rejects"]) == ("shard", 0, 0)
    for name in ("rows", "tokens", "positions", "bytes"):
        assert shard[name] == getattr(entry, name)
    for each, positions in ((first, 3), (second, 0)):
        assert (each["event"], each["stage"]) == ("done", "build-targets")
        assert each["fingerprint"] == manifest.fingerprint
        assert each["totals"] == manifest.totals
        assert each["positions"] == positions
    assert first["seconds"] > 0 == second["seconds"]
