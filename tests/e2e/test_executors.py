"""Several workers through the whole commands: tasks side by side, and a real Ray cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.tiers import slow

QPIPE = Path(sys.executable).with_name("qpipe")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they hold no engine
RAY = ("--executor", "ray", "--workers", 2)


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    words = [str(argument) for argument in arguments]
    return subprocess.Popen(
        [QPIPE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def succeed(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


def refused(process: subprocess.Popen[str]) -> str:
    """The one line of a command that must refuse."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 2, (out, err)
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    return line


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ray_processes() -> list[str]:
    """Ray's own processes and workers on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if words.startswith(AGENTS):
            continue  # after a SIGKILL they end by themselves, some minutes later
        if "raylet" in words or "gcs_server" in words or words.startswith("ray::"):
            found.append(f"{folder.name} {words[:80]}")
    return found


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[object, ...]:
    """A command of 12 shards, one row rejected, that lacks --out."""
    rows: list[object] = [
        {"prompt": f"Say {n}.", "completion": f"The answer is {n}. " * (1 + n % 7)}
        for n in range(95)
    ]
    rows.insert(40, {"text": "no known form"})
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("score", "--model", tiny_model, "--demonstrations", file, "--engine", "transformers",
            "--top-k", 8, "--shard-size", 8, "--out")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, score: Sequence[object]) -> Path:
    """scores/ and targets/, by one process each. Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    qpipe(*score, root / "scores")
    qpipe("build-targets", "--scores", root / "scores", "--out", root / "targets")
    return root


@pytest.fixture(autouse=True)
def no_ray_left() -> Iterator[None]:
    before = ray_processes()
    yield
    deadline = time.monotonic() + 30
    while set(ray_processes()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(ray_processes()) <= set(before)


@pytest.mark.parametrize("name", ["targets", *slow("scores")])
def test_an_array_of_tasks_makes_one_folder(
    made: Path, score: Sequence[object], tmp_path: Path, name: str
) -> None:
    """At the same time, as a Slurm array that is numbered from 1."""
    out = tmp_path / name
    build = ("build-targets", "--scores", made / "scores", "--out")
    tasks = [
        start(*(score if name == "scores" else build), out, SLURM_ARRAY_TASK_ID=str(task),
              SLURM_ARRAY_TASK_MIN="1", SLURM_ARRAY_TASK_COUNT="3")
        for task in (1, 2, 3)
    ]  # fmt: skip
    said = [succeed(task) for task in tasks]
    assert any("supervised tokens" in each for each in said)
    assert folder_bytes(out) == folder_bytes(made / name)


def test_a_task_says_what_is_left(score: Sequence[object], tmp_path: Path) -> None:
    out, log = tmp_path / "scores", tmp_path / "log.jsonl"
    said = qpipe(*score, out, "--rank", 1, "--world-size", 5, "--log-json", log)
    assert "rank 1 of 5: 3 shards made" in said
    assert "3 of 12 are there" in said
    first, *shards, last = map(json.loads, log.read_text().splitlines())
    assert (first["event"], first["shards"], first["committed"]) == ("start", 12, 0)
    assert [each["index"] for each in shards] == [1, 6, 11]
    assert (last["event"], last["made"], last["there"], last["shards"]) == ("part", 3, 3, 12)
    line = qpipe(*score, out, "--rank", 0, "--world-size", 2, "--method", "sft", fails=True)
    assert "--method" in line
    assert "top_k is 8 there and 9 now" in qpipe(
        *score, out, "--top-k", 9, "--rank", 0, "--world-size", 2, fails=True
    )


def test_ray_builds_the_same_targets(made: Path, tmp_path: Path) -> None:
    succeed(start("build-targets", "--scores", made / "scores", "--out", tmp_path / "targets",
                  *RAY))  # fmt: skip
    assert folder_bytes(tmp_path / "targets") == folder_bytes(made / "targets")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The Ray workers that make shards for this command, and for no other on the machine."""
    found = [int(line.split()[0]) for line in ray_processes() if " ray::_Worker.make" in line]
    return [pid for pid in found if process.pid in ancestors(pid)]


def ancestors(pid: int) -> Iterator[int]:
    while pid:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            return
        yield pid


@pytest.mark.slow
def test_the_shard_of_a_killed_worker_is_made_by_another(
    made: Path, score: Sequence[object], tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    process = start(*score, out, *RAY)
    killed = 0
    while process.poll() is None and killed < 2:
        for pid in workers_of(process):
            if killed < 2 and len(list(out.glob("shard-*.json"))) >= 3 * killed:
                os.kill(pid, signal.SIGKILL)
                killed += 1
                break
        time.sleep(0.01)
    succeed(process)
    assert killed == 2
    assert folder_bytes(out) == folder_bytes(made / "scores")


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_ends_the_run(
    made: Path, score: Sequence[object], tmp_path: Path
) -> None:
    """Committed shards stay, and a later run finishes the folder."""
    out = tmp_path / "scores"
    process = start(*score, out, "--executor", "ray", "--workers", 1)
    killed = set()
    while process.poll() is None:
        if len(list(out.glob("shard-*.json"))) >= 2:
            for pid in set(workers_of(process)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.005)
    line = refused(process)
    # a shard committed as its worker ended counts as not made, and is made again; a worker has
    # two at a time, and its end counts against both
    assert re.search("3 Ray workers failed while making shard [123]", line)
    assert "finished shards are kept" in line
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.arrow")}
    assert len(kept) >= 2
    succeed(start(*score, out))
    assert folder_bytes(out) == folder_bytes(made / "scores")
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in out.iterdir()}.items()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ray_ends_with_the_command(score: Sequence[object], tmp_path: Path, stop: int) -> None:
    out = tmp_path / "scores"
    process = start(*score, out, *RAY)
    while process.poll() is None and not list(out.glob("shard-*.json")):
        time.sleep(0.01)
    process.send_signal(stop)
    _, err = process.communicate(timeout=400)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert process.returncode == expected[signal.Signals(stop)], err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ray_refuses_what_cannot_be(score: Sequence[object], tmp_path: Path) -> None:
    out = tmp_path / "scores"
    assert "--workers 99: Ray has" in refused(
        start(*score, out, "--executor", "ray", "--workers", 99)
    )
    line = refused(start(*score, out, "--executor", "ray", "--ray-address", "127.0.0.1:1"))
    assert "Ray cannot be reached at --ray-address 127.0.0.1:1" in line
    assert not list(out.glob("shard-*"))
