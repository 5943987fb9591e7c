"""A Ray cluster of two machines, one of which loses its power."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Words, folder_bytes, python, succeed
from .hosts import Host, wait_until

PORT = 6379
RAY = Path(sys.executable).with_name("ray")
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}  # of all machines


@pytest.fixture
def cluster(hosts: tuple[Host, Host], log: Path) -> Iterator[tuple[Host, Host]]:
    """Ray on both, with one worker's room on each."""
    alpha, beta = hosts
    common = ("start", "--num-cpus", 1, "--block", "--disable-usage-stats")
    address = f"{alpha.address}:{PORT}"
    own = ("--node-ip-address", alpha.address, "--port", PORT, "--include-dashboard", "false")
    alpha.start(RAY, *common, "--head", *own, log=log, **TOKEN)
    wait_until(lambda: "Ray runtime started" in log.read_text())
    beta.start(
        RAY, *common, "--address", address, "--node-ip-address", beta.address, log=log, **TOKEN
    )
    wait_until(lambda: any("raylet" in words for words in beta.processes().values()))
    yield hosts
    for host in hosts:
        host.lose_power()


def test_a_machine_that_loses_its_power(
    cluster: tuple[Host, Host], made: Path, score: Words, tmp_path: Path, log: Path
) -> None:
    """Its shards go to the other one."""
    alpha, beta = cluster
    out = tmp_path / "scores"
    ray = ("--executor", "ray", "--workers", 2, "--ray-address", f"{alpha.address}:{PORT}")
    running = alpha.start(*python("qpipe.stages"), *score, out, *ray, log=log, **TOKEN)
    wait_until(lambda: len(list(out.glob("shard-*.arrow"))) >= 4)
    assert any("ray::_Worker" in words for words in beta.processes().values())
    beta.lose_power()
    succeed(running, log)
    assert folder_bytes(out) == folder_bytes(made / "scores")
