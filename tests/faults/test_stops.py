"""Commands that are asked to end, by SIGTERM and Ctrl-C, at any operation on their folder.

Exit status 143 or 130 says that something is left to be made, 0 that all is done. What was under
work is given up and leaves nothing behind, but for a training that gets SIGTERM: it finishes the
step and writes a checkpoint.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from qpipe.tests.faults.work import Work
from qpipe.tests.support.processes import Command
from qpipe.tests.support.tiers import slow
from qpipe.trainer.run.checkpoint import checkpoints_in

OPERATIONS = 1000
STATUS = {"terminate": 128 + signal.SIGTERM, "interrupt": 128 + signal.SIGINT}


@pytest.mark.parametrize("step", [37, *slow(3)])
@pytest.mark.parametrize("fault", STATUS)
def test_at_any_operation(work: Work, tmp_path: Path, fault: str, step: int) -> None:
    ends = set()
    for number in range(step // 2 + 1, OPERATIONS, step):
        out = tmp_path / str(number)
        command = work.strike(out, fault, number)
        status = command.wait()
        ends.add(status)
        if status == 0:
            work.judge(out)
            if not struck(work, tmp_path / "more", fault, number + step):
                break
            continue
        assert status == STATUS[fault], command.said
        assert_stopped(work, command, out, fault)
        work.resume(out)
    assert STATUS[fault] in ends
    assert number < OPERATIONS


def test_ctrl_c_from_the_impatient(work: Work, tmp_path: Path) -> None:
    """Again and again, while the command puts things in order, says so, and ends."""
    out = tmp_path / "out"
    command = work.start(out)
    while command.is_running and not out.exists():
        time.sleep(0.01)
    while command.is_running:
        command.signal(signal.SIGINT)
        time.sleep(0.005)
    assert command.wait() in (STATUS["interrupt"], -signal.SIGINT), command.said
    assert_stopped(work, command, out, "interrupt")
    work.resume(out)


def test_ctrl_c_from_the_impatient_until_python_itself_has_ended(
    works: Mapping[str, Work], tmp_path: Path
) -> None:
    """In a process of its own: one that is forked here has less to end."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "qpipe.stages", *works["score"].words, out]
    with subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True) as process:
        while not out.exists() and process.poll() is None:
            time.sleep(0.01)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode in (STATUS["interrupt"], -signal.SIGINT), said
    assert said.count("Stopped: finished shards") == 1, said
    assert "Traceback" not in said, said


def struck(work: Work, out: Path, fault: str, number: int) -> bool:
    """Whether there is such an operation at all."""
    return work.start(out, fault="kill", at=number).wait() != 0


def assert_stopped(work: Work, command: Command, out: Path, fault: str) -> None:
    """It said so in one line, and nothing half-made lies about.

    But for a checkpoint that Ctrl-C came into, which the next one removes.
    """
    lines = command.said.splitlines()
    assert "Traceback" not in command.said, command.said
    assert [line for line in lines if line.startswith("Stopped: finished shards")], command.said
    left = [path.name for path in out.rglob(".*.tmp")]
    assert not left or (work.name, fault) == ("train", "interrupt")
    if work.name == "train" and fault == "terminate":
        assert last_checkpoint(out) == last_step(out)


def last_step(out: Path) -> int:
    log = out / "log.jsonl"
    events = map(json.loads, log.read_text().splitlines() if log.exists() else [])
    return max((each["step"] for each in events if each["event"] == "step"), default=0)


def last_checkpoint(out: Path) -> int:
    return int(checkpoints_in(out)[-1].name.removeprefix("step-")) if checkpoints_in(out) else 0


@pytest.mark.slow
def test_sigterm_at_random_moments(work: Work, tmp_path: Path) -> None:
    rng = random.Random(work.name)
    for number in range(15):
        out = tmp_path / str(number)
        command = work.start(out)
        time.sleep(rng.uniform(0, work.seconds))
        command.signal(signal.SIGTERM)
        status = command.wait()
        # before Python runs the command nobody listens
        assert status in (0, STATUS["terminate"], -signal.SIGTERM), command.said
        work.count("other faults", int(status != 0))
        if status == STATUS["terminate"]:
            assert_stopped(work, command, out, "terminate")
        work.resume(out)


@pytest.mark.slow
def test_processes_of_a_training_agree_where_they_stop(
    works: Mapping[str, Work], tmp_path: Path
) -> None:
    """Under torchrun, which passes the signal on to each of them when it comes."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    out = tmp_path / "run"
    words = [sys.executable, *launch, "-m", "qpipe.stages", *works["train"].words, out]
    more = ["--save-every", 1000, "--epochs", 400, "--max-steps", 600]
    words = list(map(str, words + more))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    stops = []
    for _ in range(2):
        with subprocess.Popen(
            words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            before = last_step(out)
            while last_step(out) < before + 20 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=120)[1]
        assert process.returncode != 0
        assert said.count("Stopped: finished shards") == 2, said
        stops.append(last_step(out))
        assert last_checkpoint(out) == stops[-1] > before
        assert {path.name for path in checkpoints_in(out)[-1].glob("process-*")} == {
            "process-0.safetensors", "process-1.safetensors",
        }  # fmt: skip
    assert stops[0] < stops[1] < 600
