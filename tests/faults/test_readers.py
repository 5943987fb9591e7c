"""Two hundred readers of a folder in a store, whose cache has room for less than a shard."""

import subprocess
import sys
from pathlib import Path

import pytest
from qpipe.pipeline import read_scores
from qpipe.tests.support.folders import seal_scores
from qpipe.tests.support.s3 import Bucket

PROCESSES, THREADS, ROUNDS = 4, 50, 2
READ = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from qpipe.pipeline import read_scores
from qpipe.pipeline.storage import cache

cache.FRESH = 0.0  # nothing is left alone

def ids(_):
    return [each.id for _ in range({ROUNDS}) for each in read_scores("s3://bucket/scores")]

with ThreadPoolExecutor({THREADS}) as pool:
    found = list(pool.map(ids, range({THREADS})))
print(len(found), len(found[0]), len(set(map(tuple, found))))
"""


@pytest.mark.slow
def test_readers_of_an_evicting_cache_lose_nothing(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QPIPE_CACHE_GB", "1e-6")  # of a kilobyte: less than a shard
    folder = seal_scores(tmp_path / "scores")
    for path in folder.iterdir():
        s3.put(f"scores/{path.name}", path.read_bytes())
    readers = [
        subprocess.Popen([sys.executable, "-c", READ], stdout=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    said = [reader.communicate(timeout=600)[0].split() for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * PROCESSES
    rows = sum(1 for _ in read_scores(folder))
    assert said == [[str(THREADS), str(ROUNDS * rows), "1"]] * PROCESSES
