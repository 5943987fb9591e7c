"""Training over two machines, one of which loses its power."""

import json
import subprocess
from pathlib import Path

import pytest
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.runs import assert_same_weights

from .conftest import Words, python, succeed
from .hosts import Host, wait_until

Hosts = tuple[Host, Host]


@pytest.fixture(scope="module")
def train(made: Path, tiny_model: Path) -> Words:
    """A command that lacks --out."""
    return ("train", "--targets", made / "targets", "--model", tiny_model, "--batch-size", 8,
            "--save-every", 1, "--eval-fraction", 0.1, "--out")  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, train: Words) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    qpipe(*train, out)
    return out


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_two_machines_train_as_one_process(
    hosts: Hosts, train: Words, alone: Path, tmp_path: Path, log: Path, form: str
) -> None:
    out = tmp_path / "run"
    options = ("--fsdp",) if form == "fsdp" else ()
    for process in launched(hosts, (*train, out, *options), log):
        succeed(process, log)
    # Adam divides each gradient by its size: where it is nearly 0, its rounding is seen
    assert_same_weights(out, alone, rtol=0, atol=1e-3)


def test_a_machine_that_loses_its_power(
    hosts: Hosts, train: Words, tmp_path: Path, log: Path
) -> None:
    """The other one ends, and the run goes on from its last checkpoint to the same weights."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    for process in launched(hosts, (*train, whole, "--fsdp"), log):
        succeed(process, log)
    first, second = launched(hosts, (*train, out, "--fsdp"), log)
    wait_until(lambda: steps(out) >= 3)
    hosts[1].lose_power()
    assert second.wait(timeout=60) != 0
    assert first.wait(timeout=400) != 0
    assert not (out / "qpipe.json").exists()
    for process in launched(hosts, (*train, out, "--fsdp"), log):
        succeed(process, log)
    assert steps(out) == steps(whole)  # resumed: none was taken twice
    assert_same_weights(out, whole, rtol=0, atol=0)


def launched(hosts: Hosts, command: Words, log: Path) -> list[subprocess.Popen[bytes]]:
    """A process of the training on each machine."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].name}:29500")
    launch = python("torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, *rendezvous)
    return [host.start(*launch, "-m", "qpipe.stages", *command, log=log) for host in hosts]


def steps(out: Path) -> int:
    """The steps that the log has."""
    file = out / "log.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(json.loads(line)["event"] == "step" for line in lines)
