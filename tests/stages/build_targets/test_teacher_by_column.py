"""A teacher for each row, which a column of the demonstrations names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.tests.support.commands import qpipe

from .made import VOCAB, Dense, Made, made_in, score_folder, supports_of

SUBJECTS = ["code", "math", "math", "code", "code", "math", "code"]
NOISES = {"code": 1.0, "math": 3.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("by-column")


@pytest.fixture(scope="module")
def made(root: Path) -> Made:
    return made_in(root, top_k=VOCAB)


@pytest.fixture(scope="module")
def taught(made: Made) -> dict[str, list[Dense]]:
    """Both teachers at all demonstrations."""
    return {
        subject: [each.under_teacher(noise) for each in made.demonstrations]
        for subject, noise in NOISES.items()
    }


@pytest.fixture(scope="module")
def teachers(root: Path, taught: dict[str, list[Dense]]) -> dict[str, Path]:
    """The code teacher's folder holds its own examples alone, the math teacher's all, reversed."""
    own = [each for each, name in zip(taught["code"], SUBJECTS, strict=True) if name == "code"]
    return {
        "code": score_folder(root / "code", own, 2, top_k=VOCAB),
        "math": score_folder(root / "math", taught["math"][::-1], 4, top_k=VOCAB),
    }


def file_of(root: Path, made: Made, subjects: list[Any]) -> Path:
    rows = [
        {"id": each.name, "messages": []} | ({} if name is None else {"subject": name})
        for each, name in zip(made.demonstrations, subjects, strict=True)
    ]
    path = root / f"{abs(hash(str(subjects)))}.jsonl"
    # in another order, and with a row that is not among the scores
    rows = [{"id": "unscored", "messages": []}, *rows[::-1]]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("order", [("code", "math"), ("math", "code")])
def test_each_row_has_the_residual_of_its_teacher(
    root: Path,
    made: Made,
    teachers: dict[str, Path],
    taught: dict[str, list[Dense]],
    order: tuple[str, str],
) -> None:
    out = root / "-".join(order)
    qpipe("build-targets", "--scores", made.scores, "--teacher", *(teachers[n] for n in order),
          "--teacher-column", "subject", "--teacher-values", ",".join(order), "--demonstrations",
          file_of(root, made, SUBJECTS), "--top-p", 1, "--precision", "float32",
          "--out", out)  # fmt: skip
    manifest = read_manifest(out)
    assert manifest.settings["teacher_column"] == "subject"
    assert manifest.settings["teacher_values"] == list(order)
    assert list(manifest.identity.inputs) == ["scores", "teacher", "teacher-2"]
    for number, (example, subject) in enumerate(zip(read_targets(out), SUBJECTS, strict=True)):
        wanted = np.exp(taught[subject][number].log_probs)
        assert example.id == made.demonstrations[number].name
        for n, support in enumerate(supports_of(example)):
            found = np.array([support[k] for k in range(VOCAB)])
            np.testing.assert_allclose(found, wanted[n], atol=1e-6)


def test_other_subjects_are_another_folder(
    root: Path, made: Made, teachers: dict[str, Path]
) -> None:
    both = ("--teacher", teachers["math"], made.teacher, "--teacher-column", "subject",
            "--teacher-values", "math,code", "--demonstrations")  # fmt: skip
    build = ("build-targets", "--scores", made.scores, "--out", root / "again", *both)
    qpipe(*build, file_of(root, made, SUBJECTS))
    line = qpipe(*build, file_of(root, made, SUBJECTS[::-1]), fails=True)
    assert "teacher_of_rows" in line


def test_methods_are_compared_with_the_teachers_of_the_rows(
    root: Path, made: Made, teachers: dict[str, Path], taught: dict[str, list[Dense]]
) -> None:
    said = qpipe("compare-methods", made.scores, "--teacher", *teachers.values(),
                 "--teacher-column", "subject", "--teacher-values", "code,math",
                 "--demonstrations", file_of(root, made, SUBJECTS))  # fmt: skip
    (line,) = (line for line in said.splitlines() if line.startswith("kd "))
    losses = [
        -taught[subject][i].log_probs[n, y]
        for i, subject in enumerate(SUBJECTS)
        for n, y in enumerate(made.demonstrations[i].observed)
    ]
    assert float(line.split()[2]) == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ([*SUBJECTS[:6], "law"], "example chats:6 has subject 'law': give a teacher for it"),
        ([*SUBJECTS[:6], None], "example chats:6 has no field subject: give a teacher for it"),
        (["code", "code", *SUBJECTS[2:]], "code: lacks example chats:1, which --teacher-column"),
    ],
)
def test_a_row_without_a_teacher_is_refused(
    root: Path, made: Made, teachers: dict[str, Path], subjects: list[Any], message: str
) -> None:
    line = qpipe("build-targets", "--scores", made.scores, "--teacher", *teachers.values(),
                 "--teacher-column", "subject", "--teacher-values", "code,math",
                 "--demonstrations", file_of(root, made, subjects), "--out", root / "refused",
                 fails=True)  # fmt: skip
    assert message in line
    assert not (root / "refused").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher-values", "code"), "give 2 different values of subject, one for each"),
        (("--teacher-values", "code,code"), "give 2 different values of subject"),
        ((), "--teacher-column, --teacher-values and --demonstrations go together"),
        (
            ("--teacher-values", "code,math", "--teacher-weights", "2,1"),
            "--teacher-weights and --teacher-mean go with several teachers",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    root: Path, made: Made, teachers: dict[str, Path], words: tuple[str, ...], message: str
) -> None:
    line = qpipe("build-targets", "--scores", made.scores, "--teacher", *teachers.values(),
                 "--teacher-column", "subject", *words, "--demonstrations",
                 file_of(root, made, SUBJECTS), "--out", root / "refused", fails=True)  # fmt: skip
    assert message in line


def test_other_tokens_and_other_demonstrations_are_refused(
    root: Path, made: Made, teachers: dict[str, Path]
) -> None:
    build = ("build-targets", "--scores", made.scores, "--out", root / "refused",
             "--teacher-column", "subject", "--teacher-values", "code,math")  # fmt: skip
    other = [each.under_teacher() for each in made.demonstrations]
    other[0].input_ids[0] ^= 1
    wrong = score_folder(root / "wrong", other, 3, top_k=VOCAB)
    subjects = file_of(root, made, SUBJECTS)
    teacher = ("--teacher", wrong, teachers["math"])
    line = qpipe(*build, *teacher, "--demonstrations", subjects, fails=True)
    assert "wrong: its example chats:0 has other tokens than in" in line
    elsewhere = root / "elsewhere.jsonl"
    elsewhere.write_text(json.dumps({"id": "z", "subject": "code", "messages": []}))
    line = qpipe(*build, *teacher, "--demonstrations", elsewhere, fails=True)
    assert "its example chats:0 is not among the demonstrations" in line
    twice = score_folder(root / "twice", [*made.demonstrations, made.demonstrations[1]], 3)
    line = qpipe(*build, "--teacher", twice, twice, "--demonstrations", subjects, fails=True)
    assert "twice: holds example chats:1 twice: score the teacher with --at" in line
    few = score_folder(root / "few", made.demonstrations, 3, top_k=5)
    line = qpipe(*build, "--teacher", few, teachers["math"], "--demonstrations", subjects,
                 fails=True)  # fmt: skip
    assert "math: its top_k is 24, that of" in line
