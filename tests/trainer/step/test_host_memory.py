"""Freed memory that is kept."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import ctypes, sys
from resource import RUSAGE_SELF, getrusage
from qpipe.trainer.step.distributed import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "kept":
    keep_freed_memory()
before = getrusage(RUSAGE_SELF).ru_minflt
for turn in range(10):
    arrays = [library.malloc(20 * 2**20) for _ in range(5)]
    for array in arrays:
        ctypes.memset(array, 1, 20 * 2**20)
    for array in arrays:
        library.free(array)
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="told of the GNU C library")
def test_the_pages_of_freed_arrays_serve_the_next_ones() -> None:
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", COUNT_FAULTS, which]))
        for which in ("kept", "given back")
    )
    assert kept < given_back / 5, (kept, given_back)
