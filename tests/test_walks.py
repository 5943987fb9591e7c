"""The settings of a command pass through few files before the first scores and the first loss."""

import json
import signal
import subprocess
import sys

# A profile function that reads the frames of all threads ends Python itself now and then, with one
# of these signals: that says nothing about the commands.
_OF_PYTHON = (-signal.SIGABRT, -signal.SIGSEGV)
_TRIES = 3


def test_settings_pass_through_few_files() -> None:
    score, train = walked()
    assert 0 < score["given"] <= 18
    assert 0 < train["given"] <= 20
    assert score["made"] <= 41
    assert train["made"] <= 48


def walked() -> list[dict[str, int]]:
    """The counts of score and of train."""
    words = [sys.executable, "-m", "qpipe.tests.walks", "--json"]
    for _ in range(_TRIES):
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        if done.returncode not in _OF_PYTHON:
            break
    assert done.returncode == 0, done.stderr
    counts: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return counts
