"""Fuzz for some minutes: every test of this folder, led by the code that its inputs reach.

    python tests/fuzz/run.py --minutes 10 [NAME…]
    python tests/fuzz/run.py test_rows.test_lines_of_anything --input FILE    # a failure again

Each test runs in a process of its own, with its share of the time, under atheris (libFuzzer): its
bytes become inputs by hypothesis, and those that reach code that none has reached before are kept
in .cache/fuzz, where the next run starts from. A failure is an exception other than those that
the test allows for, an input that takes longer than 30 seconds or 400 MB of memory, or a process
that dies. They are told by kind and place; the exit status is 1 where there is any.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "fuzz"
MOST_SECONDS, MOST_MEGABYTES = 30, 400  # that an input may take
FIRST_INPUTS, INPUT_BYTES = 50, 2048

# The commands reach more code than any reader does, and find least in a given time. The other tests
# have one share.
SHARES = {
    "test_commands.test_words_of_any_kind": 5,
    "test_commands.test_config_files_of_any_kind": 5,
}


def main() -> int:
    """Share the time out among the tests, and tell what came of it."""
    options = _options()
    names = [name for name in _tests() if not options.names or name in options.names]
    if not names:
        sys.exit(f"none of {', '.join(options.names)} is a test here")
    if options.input is not None:
        (name,) = names
        _fuzz_one(name)(options.input.read_bytes())
        return 0
    jobs = options.jobs or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(_run, *zip(*_seconds(names, options.minutes, jobs), strict=True)))
    return _report(results)


def _seconds(names: list[str], minutes: float, jobs: int) -> list[tuple[str, float]]:
    """What each test has of the time, the longest first, so that the last end together."""
    shares = sorted(((name, SHARES.get(name, 1)) for name in names), key=lambda pair: -pair[1])
    one = 60 * minutes * min(jobs, len(names)) / sum(share for _, share in shares)
    return [(name, one * share) for name, share in shares]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="tests, as in test_rows.test_lines_of_anything")
    parser.add_argument("--minutes", type=float, default=10, help="for all of them together")
    parser.add_argument("--jobs", type=int, help="tests at a time; default: one a core")
    parser.add_argument("--input", type=Path, help="run one test on the bytes of this file")
    parser.add_argument("--child", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    return parser.parse_args()


def _tests() -> Iterator[str]:
    """The fuzz tests, as their files hold them."""
    for path in sorted(HERE.glob("test_*.py")):
        is_next = False
        for line in path.read_text().splitlines():
            is_next |= line.startswith("@fuzz(")
            if is_next and line.startswith("def "):
                yield f"{path.stem}.{line.removeprefix('def ').partition('(')[0]}"
                is_next = False


# The processes that fuzz, and what they leave behind


@dataclass
class Result:
    """What came of a test: inputs tried, and failures by kind and place."""

    name: str
    inputs: int = 0
    edges: int = 0  # of the code that inputs reached
    failures: dict[str, str] = field(default_factory=dict)  # where the input is kept


def _run(name: str, seconds: float) -> Result:
    """Fuzz a test; started again, for the time that is left, where its process dies."""
    result = Result(name)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > min(5, seconds / 2):
        _run_once(result, left)
    return result


def _run_once(result: Result, seconds: float) -> None:
    folder = CACHE / result.name
    for each in ("corpus", "failures"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    _make_first_inputs(folder / "corpus")
    (folder / "said.json").unlink(missing_ok=True)
    command = [sys.executable, __file__, result.name, "--child", str(seconds)]
    before = set((folder / "failures").iterdir())
    with open(folder / "log.txt", "w") as log, TemporaryDirectory() as place:
        environ = os.environ | {"TMPDIR": place}  # the process may end before it cleans up
        status = subprocess.run(command, stdout=log, stderr=log, env=environ).returncode
    if (folder / "said.json").exists():
        said = json.loads((folder / "said.json").read_text())
        result.inputs += said["inputs"]
        result.failures |= said["failures"]
    covered = [line for line in (folder / "log.txt").read_text().splitlines() if " cov: " in line]
    if covered:
        result.edges = int(covered[-1].partition(" cov: ")[2].split()[0])
    if status:
        kept = sorted(map(str, set((folder / "failures").iterdir()) - before))
        died = f"the process ended with status {status}, see {folder / 'log.txt'}"
        result.failures[died] = kept[-1] if kept else "no input"


def _make_first_inputs(folder: Path) -> None:
    """Random bytes to start from: short ones, from which libFuzzer would start, say little."""
    if not any(folder.iterdir()):
        source = random.Random(0)
        for number in range(FIRST_INPUTS):
            (folder / f"first-{number}").write_bytes(source.randbytes(INPUT_BYTES))


def _report(results: list[Result]) -> int:
    width = max(len(result.name) for result in results)
    print(f"{'test':{width}}  {'inputs':>9}  {'edges':>6}  failures")
    for each in results:
        print(f"{each.name:{width}}  {each.inputs:9,}  {each.edges:6,}  {len(each.failures)}")
    failures = sum(len(result.failures) for result in results)
    print(f"{'all':{width}}  {sum(each.inputs for each in results):9,}  {'':6}  {failures}")
    for result in results:
        for what, kept in result.failures.items():
            print(f"\n{result.name}: {what}\n  input: {kept}")
    return 1 if failures else 0


# One such process


def _fuzz_one(name: str) -> Callable[[bytes], bytes | None]:
    # before what reads them is imported: a model's name must fail at once, not ask the network
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    module, _, test = name.partition(".")
    return getattr(import_module(f"qpipe.tests.fuzz.{module}"), test).hypothesis.fuzz_one_input


def _child(name: str, seconds: float) -> None:
    """Fuzz a test until the time is over; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["qpipe"], exclude=["qpipe.tests"]):
        fuzz_one = _fuzz_one(name)
    folder = CACHE / name
    end = time.monotonic() + seconds
    result = Result(name)
    said = 0.0

    def try_one(data: bytes) -> None:
        nonlocal said
        before = _peak_megabytes()
        try:
            result.inputs += fuzz_one(data) is not None
            if result.inputs > 1 and _peak_megabytes() - before > MOST_MEGABYTES:
                raise MemoryError(f"an input took {_peak_megabytes() - before} MB")
        except BaseException as error:
            _note(result, error, data, folder / "failures")
        now = time.monotonic()
        if now > said + 1 or now > end:
            said = now
            values = {"inputs": result.inputs, "failures": result.failures}
            (folder / "said.json").write_text(json.dumps(values))
        if now > end:
            os._exit(0)

    arguments = [
        f"-timeout={MOST_SECONDS}",
        "-rss_limit_mb=4096",
        f"-max_len={INPUT_BYTES}",
        "-len_control=0",
        f"-artifact_prefix={folder / 'failures'}/",
    ]
    atheris.Setup([sys.argv[0], *arguments, str(folder / "corpus")], try_one)
    atheris.Fuzz()


def _note(result: Result, error: BaseException, data: bytes, folder: Path) -> None:
    """Keep the first input of each kind of failure."""
    frames = [
        each for each in traceback.extract_tb(error.__traceback__) if "qpipe" in each.filename
    ]
    ours = [each for each in frames if "/tests/fuzz/inputs.py" not in each.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    what = f"{type(error).__name__} at {place}: {str(error).partition(chr(10))[0][:200]}"
    kind = what.partition(": ")[0]
    if not any(each.startswith(f"{kind}: ") for each in result.failures):
        kept = folder / f"{len(result.failures)}-{kind.replace(' ', '-').replace(':', '-')}"
        kept.write_bytes(data)
        result.failures[what] = str(kept)
        traceback.print_exception(error)


def _peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    given = _options()
    if given.child is not None:
        _child(given.names[0], given.child)
    sys.exit(main())
