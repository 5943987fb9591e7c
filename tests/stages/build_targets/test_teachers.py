"""Targets of several teachers, from their folders to their mean."""

from pathlib import Path

import numpy as np
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.tests.support.commands import qpipe

from .made import VOCAB, Dense, Floats, Made, made_in, score_folder, supports_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def made(root: Path) -> Made:
    return made_in(root, top_k=VOCAB)


@pytest.fixture(scope="module")
def taught(root: Path, made: Made) -> list[list[Dense]]:
    """Two teachers of the demonstrations; the second folder is in another order and sharding."""
    both = [[each.under_teacher(noise) for each in made.demonstrations] for noise in (1.0, 3.0)]
    score_folder(root / "second", both[1][::-1], 4, top_k=VOCAB)
    return both


def geometric(one: Floats, two: Floats) -> Floats:
    product = one ** (2 / 3) * two ** (1 / 3)
    return product / product.sum()


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_the_residual_is_the_weighted_mean_of_the_teachers(
    root: Path, made: Made, taught: list[list[Dense]], mean: str
) -> None:
    out = root / mean
    said = qpipe("build-targets", "--scores", made.scores, "--teacher", made.teacher, "--teacher",
                 root / "second", "--teacher-weights", "2,1", "--teacher-mean", mean, "--top-p", 1,
                 "--precision", "float32", "--out", out)  # fmt: skip
    assert "kd (frozen-target)" in said
    manifest = read_manifest(out)
    assert manifest.settings["teacher_weights"] == [2 / 3, 1 / 3]
    assert manifest.settings["teacher_mean"] == mean
    assert list(manifest.identity.inputs) == ["scores", "teacher", "teacher-2"]
    assert manifest.provenance["teacher-2"] == {"model": "second"}
    for number, example in enumerate(read_targets(out)):
        first, second = (np.exp(each[number].log_probs) for each in taught)
        for n, support in enumerate(supports_of(example)):
            wanted = (
                (2 * first[n] + second[n]) / 3
                if mean == "arithmetic"
                else geometric(first[n], second[n])
            )
            found = np.array([support[k] for k in range(VOCAB)])
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_one_teacher_is_stored_as_ever(root: Path, made: Made) -> None:
    qpipe(
        "build-targets", "--scores", made.scores, "--teacher", made.teacher, "--out", root / "one"
    )
    manifest = read_manifest(root / "one")
    assert list(manifest.identity.inputs) == ["scores", "teacher"]
    assert not {"teacher_weights", "teacher_mean"} & set(manifest.settings)


def test_methods_are_compared_with_the_mean(
    root: Path, made: Made, taught: list[list[Dense]]
) -> None:
    said = qpipe("compare-methods", made.scores, "--teacher", made.teacher, root / "second")
    (line,) = (line for line in said.splitlines() if line.startswith("kd "))
    losses = [
        -np.log(np.mean([np.exp(each[i].log_probs[n, y]) for each in taught]))
        for i, demonstration in enumerate(made.demonstrations)
        for n, y in enumerate(demonstration.observed)
    ]
    assert float(line.split()[2]) == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher-weights", "1"), "give 2 numbers above 0, one for each teacher, as in 1,1"),
        (("--teacher-weights", "1,0"), "--teacher-weights 1,0: give 2 numbers above 0"),
        (("--teacher-weights", "1,x"), "--teacher-weights 1,x: give 2 numbers above 0"),
        (("--teacher-weights", "1,inf"), "--teacher-weights 1,inf: give 2 numbers above 0"),
        (
            ("--teacher-mean", "geometric", "--teacher-temperature", 2),
            "--teacher-temperature 2 goes with --teacher-mean arithmetic",
        ),
    ],
)
def test_what_is_refused(
    root: Path, made: Made, taught: list[list[Dense]], words: tuple[object, ...], message: str
) -> None:
    build = ("build-targets", "--scores", made.scores, "--out", root / "refused")
    teachers = ("--teacher", made.teacher, root / "second")
    assert message in qpipe(*build, *teachers, *words, fails=True)
    for option in (("--teacher-weights", 1), ("--teacher-mean", "geometric")):
        line = qpipe(*build, *teachers[:2], *option, fails=True)
        assert "--teacher-weights and --teacher-mean go with several teachers" in line
    assert not (root / "refused").exists()
