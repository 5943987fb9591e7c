"""The command line of `build-targets`."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.methods import choose
from qpipe.tests.support.commands import Ran, run_qpipe

from .made import (
    Made,
    parameters,
    supports_of,
)


def refused_line(ran: Ran) -> str:
    assert ran.status == 2, (ran.out, ran.err)
    assert ran.out == ""
    [line] = ran.err.splitlines()
    assert line.startswith("Error: ")
    return line


def test_the_default_is_sft_kl_and_with_a_teacher_kd(made: Made, tmp_path: Path) -> None:
    for name, options, wanted in (
        ("alone", (), ("sft+kl", "frozen-target", {"lam": 0.1})),
        ("taught", ("--teacher", made.teacher), ("kd", "frozen-target", {})),
    ):
        command = ("build-targets", "--scores", made.scores, "--out", tmp_path / name, *options)
        ran = run_qpipe(*command)
        assert ran.status == 0, ran.err
        assert "nothing to do" not in ran.out
        settings = read_manifest(tmp_path / name, "build-targets").settings
        assert tuple(settings[key] for key in ("method", "form", "parameters")) == wanted
        assert (settings["top_p"], settings["max_support"]) == (0.99, 64)
        assert (settings["temperature"], settings["teacher_temperature"]) == (1.0, 1.0)
        again = run_qpipe(*command)
        assert (again.status, "nothing to do" in again.out) == (0, True)


def test_every_option_arrives(made: Made, tmp_path: Path) -> None:
    ran = run_qpipe(
        "build-targets", "--scores", made.scores, "--teacher", made.teacher, "--out",
        tmp_path / "targets", "--method", "target-sft", "--form", "live", "--param", "eta=0.25",
        "--top-p", 0.8, "--max-support", 7, "--temperature", 0.5, "--teacher-temperature", 2,
    )  # fmt: skip
    assert ran.status == 0, ran.err

    settings = read_manifest(tmp_path / "targets").settings
    assert (settings["form"], settings["parameters"]) == ("live", {"eta": 0.25})
    assert (settings["top_p"], settings["max_support"]) == (0.8, 7)
    assert (settings["temperature"], settings["teacher_temperature"]) == (0.5, 2.0)


def test_a_statistic_may_be_given(made: Made, tmp_path: Path) -> None:
    for method, param in (("flow", "tau=0.75"), ("token-cleaning", "threshold=-0.5")):
        teacher = ("--teacher", made.teacher) if method == "token-cleaning" else ()
        ran = run_qpipe(
            "build-targets", "--scores", made.scores, "--out", tmp_path / method,
            "--method", method, "--param", param, *teacher,
        )  # fmt: skip
        assert ran.status == 0, ran.err
        name, value = param.split("=")
        assert parameters(read_manifest(tmp_path / method))[name] == float(value)


NAN, INF = math.nan, math.inf
TOP_P = "give above 0, up to 1"
TEMPERATURE = "give 0.05 to 20"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *[(("--top-p", each), TOP_P) for each in (0, -0.1, 1.0000001, NAN, INF)],
        *[(("--max-support", each), "give 1 or more") for each in (0, -1)],
        *[(("--temperature", each), TEMPERATURE) for each in (0.0499, 20.01, 0, -1, NAN, INF)],
        *[
            (("--teacher", "T", "--teacher-temperature", each), TEMPERATURE)
            for each in (0.0499, 20.01, 0, NAN)
        ],
        (("--teacher-temperature", 2), "goes with --teacher: give that as well"),
        (("--teacher", "T", "--method", "gift"), "T: gift does not use a teacher"),
        (
            ("--teacher", "T", "--method", "sft+kl", "--form", "live"),
            "sft+kl does not use a teacher",
        ),
        (("--method", "magic"), "'magic' is not known: choose one of sft, dft, "),
        (("--method", "gift", "--form", "frozen-weight"), "choose one of frozen-target, live"),
        (("--method", "gem", "--form", "frozen-target"), "the loss has no lower bound"),
        (("--param", "lam=-1"), "lam=-1 is out of range: give 0 to 1e+06"),
        (("--param", "lam=nan"), "lam=nan is out of range: give 0 to 1e+06"),
        (("--param", "lam=x"), "lam=x is not a number: give 0 to 1e+06"),
        (("--param", "beta=1"), "no parameter 'beta': its parameters: lam"),
        (("--param", "lam=1", "lam=2"), "given twice"),
        (("--param", "lam"), "give a name and a value"),
        (("--method", "profit", "--param", "tau=0"), "give above 0, to 1"),
        (("--method", "flow", "--param", "tau=0"), "give above 0, to 1e+06"),
        (("--method", "gem", "--param", "h=x"), "h=x is not known: give one of linear, logsigmoid"),
    ],
    ids=lambda each: " ".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_what_cannot_be_is_refused_in_a_line_before_anything_is_read(
    tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    command = ("build-targets", "--scores", tmp_path / "missing", "--out", tmp_path / "out")
    line = refused_line(run_qpipe(*command, *words))

    assert said in line
    assert "missing" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.05, "teacher_temperature": 20, "top_p": 1e-9, "max_support": 1},
        {"temperature": 20, "teacher_temperature": 0.05, "top_p": 1.0, "max_support": 10**12},
    ],
)
def test_the_ends_of_every_range_are_allowed(
    made: Made, tmp_path: Path, options: dict[str, Any]
) -> None:
    made.build(tmp_path / "targets", choose("target-sft"), **options)

    for example in read_targets(tmp_path / "targets"):
        assert np.isfinite(example.support_probs).all()
        for support, tail in zip(supports_of(example), example.tail_mass, strict=True):
            assert sum(support.values()) + tail == pytest.approx(1, abs=1e-6)


def test_a_folder_that_is_not_there_is_refused_in_a_line(made: Made, tmp_path: Path) -> None:
    command = ("build-targets", "--out", tmp_path / "out")
    gone = tmp_path / "gone"
    assert "gone: no such folder" in refused_line(run_qpipe(*command, "--scores", gone))
    line = refused_line(run_qpipe(*command, "--scores", made.scores, "--teacher", gone))
    assert re.search("gone: no such folder$", line)
    assert not (tmp_path / "out").exists()
