"""`compare-methods`: the ceiling of every method's targets, from scores alone."""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.sealed import SealedFolder
from qpipe.pipeline.format.batches import FlatBatch, flatten
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.methods import choose
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import METHODS, choices
from qpipe.pipeline.targets.ceiling import Ceiling, ceilings, reproducible_share
from qpipe.stages.build_targets.compare_methods import (
    Comparison,
    Row,
    advice,
    compare_methods,
    ranked,
)
from qpipe.stages.build_targets.inputs import open_inputs
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.tests.support.commands import qpipe, run_qpipe
from qpipe.tests.support.examples import of_probs
from qpipe.tests.support.folders import in_shards, seal_shards
from qpipe.tests.support.methods import DIVERGENCES

from .made import weighted

VOCAB = 24
TOP_K = 20
UNKNOWN = ["gem", "idft"]  # no distribution, and the entropy over a whole vocabulary
OF_TEACHER = [
    *("kd", "kd-hybrid", "target-sft", *DIVERGENCES, "token-cleaning", "contrast"),
    *("se-kd", "tip", "amid"),
]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


def examples(
    count: int, teacher: bool = False, weighted: bool = False, top_k: int = TOP_K
) -> list[ScoredExample]:
    """Demonstrations of 1 to 5 tokens; half of them under a sure model that is often right."""
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        size = 1 + number % 5
        observed = rng.integers(0, VOCAB, size)
        logits = 1.5 * rng.standard_normal((size, VOCAB))
        if number % 2:
            logits[np.arange(size), observed] += 6.0 * (rng.random(size) < 0.8)
        if teacher:
            logits += rng.standard_normal(logits.shape)
        example = of_probs(f"chats:{number}", softmax(logits).tolist(), observed.tolist(), top_k)
        if weighted:
            weights = rng.choice([0.0, 0.5, 1.0], size).astype(np.float32)
            example = replace(example, token_weights=weights)
        made.append(example)
    return made


def score_folder(
    folder: Path,
    rows: Sequence[ScoredExample],
    shard_size: int = 3,
    top_k: int = TOP_K,
    vocab_size: int = VOCAB,
) -> Path:
    """The examples as a sealed folder, each in a batch of its own."""
    settings = {
        "model": folder.name,
        "vocab_size": vocab_size,
        "tokenizer_hash": "3fa9",
        "top_k": top_k,
    }
    seal_shards(
        folder,
        "score",
        settings,
        in_shards(rows, shard_size),
        sums_of=weighted,
        batches=lambda schema, here: [flatten(schema, [row]) for row in here],
    )
    return folder


@dataclass(frozen=True)
class Made:
    """Score folders of twelve demonstrations."""

    scores: Path
    teacher: Path
    weighted: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    return Made(
        score_folder(root / "scores", examples(12)),
        score_folder(root / "teacher", examples(12, teacher=True)),
        score_folder(root / "weighted", examples(12, weighted=True)),
    )


def names(comparison: Comparison) -> list[tuple[str, str]]:
    return [(choice.method.name, choice.form) for choice, _, _ in comparison.rows]


def row_of(comparison: Comparison, name: str, form: str = "frozen-target") -> tuple[Any, float]:
    [found] = [
        (ceiling, share)
        for choice, ceiling, share in comparison.rows
        if (choice.method.name, choice.form) == (name, form)
    ]
    return found


def first_forms(*without: str) -> list[tuple[str, str]]:
    return [(name, each.forms[0]) for name, each in METHODS.items() if name not in without]


# What is compared


def test_each_method_is_compared_in_the_form_that_build_targets_takes(made: Made) -> None:
    comparison = compare_methods(made.weighted, [made.teacher])

    assert names(comparison) == first_forms(*UNKNOWN)
    assert comparison.left_out == {"its target is not known": UNKNOWN}
    totals = read_manifest(made.weighted).totals
    assert (comparison.positions, comparison.examples) == (totals["positions"], 12)


def test_all_forms_are_compared_where_they_are_asked_for(made: Made) -> None:
    comparison = compare_methods(made.weighted, [made.teacher], all_forms=True)

    every = [(each.method.name, each.form) for each in choices()]
    assert names(comparison) == [each for each in every if each[0] not in UNKNOWN]


def test_what_cannot_be_built_is_left_out_with_the_reason(made: Made, tmp_path: Path) -> None:
    comparison = compare_methods(made.scores)

    assert names(comparison) == first_forms("cft", *OF_TEACHER, *UNKNOWN)
    carry_none = f"needs token weights, and the demonstrations of {made.scores} carry none"
    assert comparison.left_out == {
        "needs a teacher": OF_TEACHER,
        carry_none: ["cft"],
        "its target is not known": UNKNOWN,
    }

    few = score_folder(tmp_path / "few", examples(12, top_k=5), top_k=5)
    small = compare_methods(few, all_forms=True)
    reason = f"needs the 20 most probable tokens, {few} holds 5"
    assert small.left_out[reason] == ["eaft"]
    assert small.left_out["needs a teacher"] == OF_TEACHER  # each once, of all its forms
    left_out = {name for each in small.left_out.values() for name in each}
    assert {name for name, _ in names(small)} | left_out == METHODS.keys()
    assert [form for name, form in names(small) if name == "eaft"] in ([], ["live"])


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.8, 0.9)])
def test_each_row_is_what_build_targets_stores_for_the_same_choice(
    made: Made, tmp_path: Path, temperatures: tuple[float, float]
) -> None:
    comparison = compare_methods(made.weighted, [made.teacher], *temperatures, all_forms=True)

    assert len(comparison.rows) > 40
    for choice, ceiling, share in comparison.rows:
        settings = BuildSettings(
            made.weighted,
            tmp_path / f"{choice.method.name}-{choice.form}",
            choice_as_given(choice),
            teacher=(made.teacher,) if choice.needs_teacher else (),
            top_p=1.0,
            max_support=2**31,
            temperature=temperatures[0],
            teacher_temperature=temperatures[1] if choice.needs_teacher else 1.0,
        )
        manifest = build_targets(settings).manifest
        assert manifest.settings["parameters"] == choice.parameters
        wanted = ceilings(manifest.totals["sums"])[0]
        for value in ("nll", "learnable", "starved", "divergence"):
            found = getattr(ceiling, value)
            assert found == pytest.approx(getattr(wanted, value), rel=1e-9, abs=1e-12), value
        assert (ceiling.name, ceiling.positions) == ("all", wanted.positions)
        assert share == reproducible_share(manifest.totals["sums"], 12)
    # a table of one and the same number would prove little
    assert len({round(ceiling.nll, 6) for _, ceiling, _ in comparison.rows}) > 12
    assert len({ceiling.learnable for _, ceiling, _ in comparison.rows}) > 5
    assert len({share for _, _, share in comparison.rows}) > 3


def choice_as_given(choice: Choice) -> Choice:
    """The choice as it was before the data set had its say."""
    statistic = choice.method.statistic
    if statistic is None:
        return choice
    given = dict(choice.parameters)
    del given[statistic.parameter]
    return replace(choice, parameters=given)


def test_a_comparison_worked_out_by_hand(tmp_path: Path) -> None:
    """b(y) is 0.5 as the mode, 0.04 beside a mode of 0.9; 0.25 beside 0.5 in the other one."""
    rows = [
        of_probs("a", [[0.5, 0.25, 0.2, 0.05], [0.9, 0.04, 0.03, 0.03]], [0, 1], 4),
        of_probs("b", [[0.5, 0.25, 0.2, 0.05]], [1], 4),
    ]
    folder = score_folder(tmp_path / "scores", rows, 1, top_k=4, vocab_size=4)

    comparison = compare_methods(folder, all_forms=True)

    b_y = [0.5, 0.04, 0.25]
    sft, share = row_of(comparison, "sft")
    assert (sft.nll, sft.learnable, sft.starved, share) == (0, 1, 0, 1)
    assert sft.divergence == pytest.approx(-sum(map(math.log, b_y)) / 3, rel=1e-6)

    dft, share = row_of(comparison, "dft")
    targets = [b + (1 - b) * b for b in b_y]
    assert dft.nll == pytest.approx(-sum(map(math.log, targets)) / 3, rel=1e-6)
    assert dft.learnable == pytest.approx(2 / 3)  # 0.4375 beats 0.375, 0.0784 not 0.864
    assert dft.starved == pytest.approx(1 / 3)
    assert share == 1 / 2
    divergences = [
        q * math.log(q / b) + (1 - q) * math.log((1 - q) / (1 - b))
        for q, b in zip(targets, b_y, strict=True)
    ]
    assert dft.divergence == pytest.approx(sum(divergences) / 3, rel=1e-5)
    live, live_share = row_of(comparison, "dft", "live")  # the student is the base at first
    assert (live.learnable, live.starved, live_share) == (dft.learnable, dft.starved, share)
    assert live.nll == pytest.approx(dft.nll, rel=1e-6)
    assert live.divergence == pytest.approx(dft.divergence, rel=1e-6)

    weight, share = row_of(comparison, "dft", "frozen-weight")  # one-hot, however slow
    assert (weight.nll, weight.learnable, share) == (0, 1, 1)
    assert weight.starved == pytest.approx(1 / 3)

    smooth, _ = row_of(comparison, "label-smoothing")
    assert smooth.nll == pytest.approx(-math.log(0.9 + 0.1 / 4), rel=1e-6)


@pytest.mark.parametrize("shard_size", [1, 5, 100])
def test_sharding_does_not_matter(made: Made, tmp_path: Path, shard_size: int) -> None:
    scores = score_folder(tmp_path / "scores", examples(12), shard_size)
    teacher = score_folder(tmp_path / "teacher", examples(12, teacher=True)[::-1], 4)

    wanted = compare_methods(made.scores, [made.teacher])
    found = compare_methods(scores, [teacher])

    assert len(found.rows) == len(wanted.rows) > 15
    for one, other in zip(found.rows, wanted.rows, strict=True):
        assert one[0] == other[0]
        assert one[1].nll == pytest.approx(other[1].nll, rel=1e-9, abs=1e-12)
        assert one[1].divergence == pytest.approx(other[1].divergence, rel=1e-9, abs=1e-12)
        assert one[2] == other[2]


# What one method cannot have is no reason to refuse the others


def test_a_head_at_which_the_base_is_not_known_leaves_contrast_out(tmp_path: Path) -> None:
    base, apart = [0.5, 0.3, 0.15, 0.04, 0.01], [0.1, 0.1, 0.1, 0.1, 0.6]
    scores = score_folder(tmp_path / "scores", [of_probs("a", [base], [0], 2)], 1, 2, 5)
    teacher = score_folder(tmp_path / "teacher", [of_probs("a", [apart], [0], 2)], 1, 2, 5)

    comparison = compare_methods(scores, [teacher])

    compared = [name for name, _ in names(comparison)]
    assert "target-sft" in compared
    assert "contrast" not in compared
    assert ["contrast"] in comparison.left_out.values()


def test_a_median_of_0_leaves_flow_out(tmp_path: Path) -> None:
    rows = [of_probs(str(n), [[1.0, 1e-9]], [0], 2) for n in range(3)]
    scores = score_folder(tmp_path / "scores", rows, 3, 2, 2)

    comparison = compare_methods(scores)

    compared = [name for name, _ in names(comparison)]
    assert "sft+kl" in compared
    assert "flow" not in compared
    assert ["flow"] in comparison.left_out.values()
    assert ["talr"] in comparison.left_out.values()


# How it goes about it


def owner(array: NDArray[Any]) -> NDArray[Any]:
    """The array whose memory a view shows: it lives as long as any of its views."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class Reader:
    """Counts the batches of a folder that were read and those that are still in memory."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[weakref.ref[NDArray[Any]]] = []
        self.most_alive = 0
        batches = SealedFolder.batches

        def counted(of: SealedFolder, shard: int, *, verify: bool = True) -> Iterator[FlatBatch]:
            for batch in batches(of, shard, verify=verify):
                if of.path == folder:
                    self.read.append(weakref.ref(owner(batch["topk_log_probs"])))
                    alive = sum(each() is not None for each in self.read)
                    self.most_alive = max(self.most_alive, alive)
                yield batch

        monkeypatch.setattr(SealedFolder, "batches", counted)


def test_scores_are_streamed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = score_folder(tmp_path / "scores", examples(40), shard_size=20)
    teacher = score_folder(tmp_path / "teacher", examples(40, teacher=True), shard_size=20)
    for folder in (scores, teacher):
        reader = Reader(folder, monkeypatch)
        compare_methods(scores, [teacher], all_forms=True)
        assert len(reader.read) == 2 * 40  # once for the statistics, once for the ceilings
        assert reader.most_alive <= 3

    reader = Reader(scores, monkeypatch)
    kept = list(open_inputs(scores, [teacher]).all_evidence("kept"))
    assert reader.most_alive == len(kept) == 40  # the reader would have seen it


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = score_folder(tmp_path / "scores", examples(5))
    teacher = score_folder(tmp_path / "teacher", examples(5, teacher=True))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def state() -> dict[Path, tuple[int, bytes]]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    qpipe("compare-methods", scores, "--teacher", teacher)

    assert state() == before
    assert list(work.iterdir()) == []


# The command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", 0.01), "--temperature 0.01 is out of range: give 0.05 to 20"),
        (("--temperature", "nan"), "--temperature nan is out of range: give 0.05 to 20"),
        (
            ("--teacher", "T", "--teacher-temperature", 21),
            "--teacher-temperature 21 is out of range: give 0.05 to 20",
        ),
        (("--teacher-temperature", 2), "goes with --teacher: give that as well"),
        ((), "missing: no such folder"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(options: tuple[object, ...], said: str) -> None:
    done = run_qpipe("compare-methods", "missing", *options)

    assert (done.status, done.out) == (2, "")
    [line] = done.err.splitlines()
    assert line.startswith("Error: ")
    assert said in line


def test_the_options_arrive(made: Made) -> None:
    out = qpipe(
        "compare-methods", made.weighted, "--teacher", made.teacher, "--all-forms",
        "--temperature", 0.8, "--teacher-temperature", 0.9,
    )  # fmt: skip
    comparison = compare_methods(made.weighted, [made.teacher], 0.8, 0.9, all_forms=True)
    lines = [line.split() for line in out.splitlines()[1 : len(comparison.rows) + 1]]
    assert [tuple(line[:3]) for line in lines] == [
        (choice.method.name, choice.form, f"{ceiling.nll:.4f}")
        for choice, ceiling, _ in ranked(comparison.rows)
    ]


def row(name: str, nll: float, learnable: float, divergence: float, share: float) -> Row:
    return choose(name, "live"), Ceiling("all", 9, nll, learnable, 0.0, divergence), share


def test_the_best_come_first_and_the_advice_names_the_first() -> None:
    rows = [
        row("dft", 2.0, 0.5, 0.01, 0.2),
        row("sft", 0.0, 1.0, 2.0, 1.0),
        row("gift", 1.0, 0.6, 0.03, 0.6),  # of too few tokens
        row("sft+kl", 0.1, 1.0, 0.25, 1.0),
        row("profit", 1.0, 0.5, 0.01, 0.2),
        row("kd", 0.3, 0.9, 0.1, 0.5),
    ]
    assert [each[0].method.name for each in ranked(rows)] == [
        *("kd", "sft+kl", "sft"),
        *("gift", "profit", "dft"),
    ]
    assert advice(rows) == (
        "of the 3 that can teach most demonstrations, kd (live) stays nearest to the base, 0.1 "
        "nats a token, and can teach 50% of them; the last 3 cannot teach half of them. The "
        "ceiling does not tell whether the teacher or the demonstrations are right"
    )
    assert advice(rows[1:2]).endswith("can teach 100% of them")
    assert advice(rows[:1]).startswith("no method here can teach half of the demonstrations")
