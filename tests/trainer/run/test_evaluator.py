"""A user's script looks at the model as it is in the middle of its training."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.run.evaluator import run_command
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings, parse_command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...support.runs import read_log
from ...support.torchrun import train_in_two_processes

# sums up the weights, and keeps the folder for the test to load
_SUM_UP = """
import json, os, shutil, sys
from pathlib import Path
from safetensors.numpy import load_file
assert "RANK" not in os.environ
weights = load_file(sys.argv[1] + "/model.safetensors")
shutil.copytree(sys.argv[1], Path(__file__).with_name("seen"), dirs_exist_ok=True)
print("here it comes")
print(json.dumps({"sum": sum(float(w.sum(dtype="float64")) for w in weights.values()), "a": "b"}))
"""


@pytest.fixture
def settings(settings: TrainSettings, tmp_path: Path) -> TrainSettings:
    """Four steps."""
    script = tmp_path / "my eval.py"
    script.write_text(_SUM_UP)
    command = f"{sys.executable} '{script}' {{checkpoint}}"
    return replace(settings, learning_rate=1e-2, batch_size=5, eval_every=2, eval_command=command)


def events(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder, "eval_command")


def sum_of(folder: Path) -> float:
    weights = load_file(folder / "model.safetensors")
    return sum(float(weight.double().sum()) for weight in weights.values())


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_numbers_of_the_model_at_each_evaluation(
    settings: TrainSettings, tmp_path: Path, lora_rank: int | None
) -> None:
    settings = replace(settings, lora_rank=lora_rank)
    train(settings)
    found = events(settings.out)
    assert [event["step"] for event in found] == [0, 2, 4]
    assert all(event["results"].keys() == {"sum"} for event in found)
    sums = [event["results"]["sum"] for event in found]
    assert sums[0] == pytest.approx(sum_of(Path(settings.model)))
    assert sums[2] == pytest.approx(sum_of(settings.out))
    assert len(set(sums)) == 3
    assert not list(settings.out.glob(".*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "seen")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "seen")) == 200
    # it is only looked at: the same weights come out
    alone = replace(settings, out=tmp_path / "alone", eval_command=None, eval_every=None)
    train(alone)
    ours, theirs = (load_file(run.out / "model.safetensors") for run in (settings, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("print('no numbers')", "not a JSON object with numbers"),
        ("print([1, 2])", "not a JSON object with numbers"),
        ("print('{}')", "not a JSON object with numbers"),
        ("print('{\"a\": NaN}')", "not a JSON object with numbers"),
        ("pass", "not a JSON object with numbers"),
    ],
)
def test_a_script_that_fails_ends_nothing(
    settings: TrainSettings, capsys: pytest.CaptureFixture[str], code: str, error: str
) -> None:
    script = Path(settings.out.parent / "my eval.py")
    script.write_text(code)
    train(replace(settings, eval_every=None))
    found = events(settings.out)
    assert [event["step"] for event in found] == [0, 4]
    assert all(error in event["error"] for event in found)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--eval-command" in line]
    assert len(warnings) == 2
    assert warnings[0].startswith("step 0: --eval-command failed: ")
    assert (settings.out / "model.safetensors").exists()
    assert not list(settings.out.glob(".*"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "python my_eval.py",
            r"lacks \{checkpoint\}, which is replaced by the model folder",
        ),
        ("python 'my_eval.py {checkpoint}", "cannot be read: No closing quotation"),
        ("no-such-program {checkpoint}", "no such program: no-such-program"),
    ],
)
def test_a_command_that_cannot_be_run(settings: TrainSettings, command: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"^--eval-command {command}: {words}"):
        replace(settings, eval_command=command)


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "a; b $HOME"
    code = "import json,sys; print(json.dumps({'same': int(sys.argv[1] == sys.argv[2] + '/m')}))"
    command = f"{sys.executable} -c \"{code}\" '{{checkpoint}}/m' {{checkpoint}}"
    assert run_command(command, folder) == {"results": {"same": 1}}
    assert parse_command("echo 'a b' {checkpoint}") == ["echo", "a b", "{checkpoint}"]


@pytest.mark.slow
def test_two_processes_run_it_once(settings: TrainSettings) -> None:
    train_in_two_processes((settings, None))
    found = events(settings.out)
    assert [event["step"] for event in found] == [0, 2, 4]
    assert found[2]["results"]["sum"] == pytest.approx(sum_of(settings.out))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"a": 1, "b": 0.5}', {"a": 1, "b": 0.5}),
        ('{"passed": true, "a": 2}', {"a": 2}),
        ('{"a": 1' + "0" * 400 + ', "b": 3}', {"b": 3}),
        ('{"a": NaN, "b": Infinity, "c": 4}', {"c": 4}),
        ("[" * 100_000, None),
    ],
)
def test_what_counts_as_a_number(tmp_path: Path, line: str, found: dict[str, float] | None) -> None:
    (tmp_path / "said").write_text(line + "\n\n")
    (tmp_path / "run.py").write_text(
        "import pathlib, sys; print(pathlib.Path(sys.argv[1], 'said').read_text())"
    )
    said = run_command(f"{sys.executable} {tmp_path / 'run.py'} {{checkpoint}}", tmp_path)
    assert said.get("results") == found
    assert ("error" in said) == (found is None)
