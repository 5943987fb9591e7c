"""What `qpipe doctor`, `--version` and `completion` say."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from qpipe import __version__
from qpipe.stages.commands.doctor import Device, Part, uses


def qpipe(*words: str, **environment: str) -> str:
    command = [sys.executable, "-m", "qpipe.stages", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    ).stdout


def test_the_version_names_torch_and_the_engine_without_importing_them() -> None:
    line = qpipe("--version")
    assert line.startswith(f"qpipe {__version__} (Python ")
    assert f"torch {version('torch')}" in line
    assert "vllm " in line
    code = (
        "import sys; from qpipe.stages.commands.doctor import version_line; version_line()\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_findings_for_people_and_for_machines() -> None:
    found = json.loads(qpipe("doctor", "--json"))
    assert found["qpipe"] == __version__
    assert found["packages"]["torch"] == version("torch")
    assert set(found["uses"]) == {"score", "build-targets", "train"}
    missing = {name for name, number in found["packages"].items() if number is None}
    assert {each["package"] for each in found["missing"]} == missing
    said = qpipe("doctor")
    assert f"torch         {version('torch')}" in said
    assert found["uses"]["score"] in said


def test_what_is_missing_comes_with_the_way_to_it() -> None:
    part = Part(("no-such-package-here",), "report --png", "pip install 'qpipe[report]'")
    assert part.version is None
    assert Part(("no-such-package-here", "numpy"), "x").version == version("numpy")


def test_what_would_be_used() -> None:
    gpus = [Device("H200", 139.0, True)] * 8
    with_engine = {"torch": "2", "vllm": "1"}
    assert uses(with_engine, gpus)["score"] == "engine vllm, on 8 × H200"
    assert uses(with_engine, gpus)["train"] == (
        "bfloat16 on H200, on all 8 with torchrun --nproc-per-node 8"
    )
    assert uses({"torch": "2"}, [])["score"] == "engine transformers, on the CPU"
    assert uses({}, [])["train"] == "cannot run"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_one_line_that_click_answers(shell: str) -> None:
    line = qpipe("completion", shell)
    assert line.count("\n") == 1
    assert f"_QPIPE_COMPLETE={shell}_source qpipe" in line


def test_the_shell_is_told_the_commands() -> None:
    code = (
        "import sys; sys.argv = ['qpipe']; from qpipe.stages.cli import cli\n"
        "cli.main(prog_name='qpipe')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"_QPIPE_COMPLETE": "bash_complete", "COMP_WORDS": "qpipe in", "COMP_CWORD": "1"},
    )
    assert done.stdout.strip() == "plain,inspect"
