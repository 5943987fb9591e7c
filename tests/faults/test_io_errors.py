"""A disk whose reads or writes fail: calls of the C library that return EIO, from the n-th on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from qpipe.tests.faults.work import Work

# Takes the place of the library's functions for files below EIO_FOLDER.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static long calls = 0;

static int fails(const char *kind, int file) {
    const char *folder = getenv("EIO_FOLDER"), *wanted = getenv("EIO_KIND");
    char link[64], path[PATH_MAX];
    if (folder == NULL || strcmp(kind, wanted)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    return __sync_add_and_fetch(&calls, 1) >= atol(getenv("EIO_FROM"));
}

#define SHIMMED(kind, name, type, parameters, arguments)                     \
    ssize_t name parameters {                                                \
        static ssize_t (*real) parameters = NULL;                            \
        if (real == NULL) real = dlsym(RTLD_NEXT, #name);                    \
        if (fails(kind, file)) { errno = EIO; return -1; }                   \
        return real arguments;                                               \
    }

SHIMMED("read", read, void *, (int file, void *to, size_t n), (file, to, n))
SHIMMED("read", pread, void *, (int file, void *to, size_t n, off_t at), (file, to, n, at))
SHIMMED("read", pread64, void *, (int file, void *to, size_t n, off64_t at), (file, to, n, at))
SHIMMED("write", write, void *, (int file, const void *of, size_t n), (file, of, n))
SHIMMED("write", pwrite, void *, (int file, const void *of, size_t n, off_t at), (file, of, n, at))
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library to be preloaded."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "eio.c").write_text(SHIM)
    words = [compiler, "-shared", "-fPIC", "-o", folder / "eio.so", folder / "eio.c", "-ldl"]
    subprocess.run(words, check=True)
    return folder / "eio.so"


def failing(
    work: Work, out: Path, shim: Path, kind: str, folder: Path, number: int
) -> subprocess.CompletedProcess[str]:
    """Run a command whose `number`-th read or write in a folder, and all after it, fail."""
    given = {"EIO_FOLDER": str(folder), "EIO_KIND": kind, "EIO_FROM": str(number)}
    environment = os.environ | given | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "qpipe.stages", *work.words, out]
    work.count("other faults")
    return subprocess.run(
        list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300
    )


def assert_one_line(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "Input/output error" in error, error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["build-targets"])
def test_from_any_write_on(
    works: Mapping[str, Work], name: str, shim: Path, tmp_path: Path
) -> None:
    work, step, ends = works[name], 7, []
    for number in range(1, 1000, step):
        out = tmp_path / str(number)
        done = failing(work, out, shim, "write", out, number)
        ends.append(done.returncode)
        if done.returncode == 0:
            work.judge(out)
            break
        assert_one_line(done)
        work.resume(out)
    assert ends[0] == 2
    assert ends[-1] == 0
