"""Writes the tables of docs/scale.md: the arithmetic, and a simulation of a thousand workers.

    python tests/simulation/scale.py        the tables stand between marks in docs/scale.md

What is assumed stands in `ASSUMED`; the rest is measured here, on one core, or simulated.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from qpipe.tests.simulation.measures import Measures, measure
from qpipe.tests.simulation.readers import Attempt, make_folder, read_by_one, read_epoch
from qpipe.tests.simulation.requests import array_requests
from qpipe.tests.simulation.scheduler import (
    Outcome,
    Trouble,
    folder_hash,
    run_array,
    run_ray,
    run_undisturbed,
)
from qpipe.tests.support.s3 import Bucket, lead_to, s3_server

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
SHARDS, WORKERS = 3000, 1000
ROWS, STEP = 9600, 1600  # of the simulated epoch
ASSUMED = {
    "prefill": 20_000,  # tokens a second on a GPU, 8B model in bfloat16: not measured here
    "tokens": 400,  # of a demonstration
    "supervised": 250,  # of these
    "target bytes": 50,  # a supervised token: docs/folders.md, tests/benchmarks/frontier.py
    "score bytes": 64 * 5.2 + 9,  # at k = 64: stages/score/plan.py
    "packed bytes": 148,  # with --precision uint16: docs/folders.md
    "shard": 512,  # demonstrations: the default of --shard-size
}
SIZES = (10**9, 10**10, 10**12)  # supervised tokens


def main() -> None:
    """Measure and simulate, then write."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        root = Path(name)
        measures = measure(root)
        tables = {
            "cost": costs(measures),
            "measured": measured(measures),
            "shards": shards(root),
            "requests": requests(),
            "stream": streams(root),
        }
    text = PAGE.read_text()
    for mark, table in tables.items():
        text = between(text, mark, table)
    PAGE.write_text(text)


def costs(measures: Measures) -> str:
    """What so many supervised tokens take."""
    a = ASSUMED

    def column(tokens: int) -> Iterable[str]:
        demonstrations = tokens / a["supervised"]
        shards = demonstrations / a["shard"]
        stored = tokens * a["target bytes"]
        yield f"{demonstrations:,.0f}"
        yield f"{shards:,.0f}"
        yield f"{demonstrations * a['tokens'] / a['prefill'] / 3600:,.0f}"
        yield size(tokens * a["score bytes"])
        yield size(tokens * a["packed bytes"])
        yield size(stored)
        yield f"{2 * shards + 2:,.0f}"
        yield size(shards * measures.entry_bytes)
        yield span(shards * measures.entry_seconds)
        yield size(shards * measures.entry_memory)
        yield span(stored / measures.hash_rate)
        yield span(demonstrations / measures.open_rate)
        yield size(demonstrations * measures.row_bytes)
        yield size(demonstrations * measures.opening_bytes)
        yield span(demonstrations * measures.length_seconds)

    names = (
        "demonstrations", "shards", "GPU hours of scoring, assumed speed", "scores, k = 64",
        "scores, --precision uint16", "targets, 99 %", "files of a folder",
        "manifest of targets", "to read it, each process",
        "memory while reading it", "to hash all targets, once an epoch, one core",
        "to open the targets, each training process", "memory of an open stream",
        "memory while opening", "to cut the steps of an epoch by --step-tokens, each process",
    )  # fmt: skip
    columns = [list(column(tokens)) for tokens in SIZES]
    head = ["supervised tokens", *(f"10^{len(str(tokens)) - 1}" for tokens in SIZES)]
    return table(head, [[name, *cells] for name, *cells in zip(names, *columns, strict=True)])


def measured(m: Measures) -> str:
    """What was measured on one core."""
    rows = [
        ["SHA-256", f"{m.hash_rate / 1e6:,.0f} MB/s"],
        ["opening targets, from the index", f"{m.open_rate:,.0f} demonstrations/s"],
        ["cutting steps by tokens", f"{m.length_seconds * 1e6:.1f} µs a demonstration"],
        ["a rank's plan of a step of 8,000, 1,000 ranks", f"{m.plan_seconds * 1e3:.0f} ms"],
        ["the order of 10^7 demonstrations", f"{m.epoch_seconds * 1e3:.0f} ms an epoch"],
        ["memory of an open stream", f"{m.row_bytes:.1f} bytes a demonstration"],
        ["memory while opening", f"{m.opening_bytes:.0f} bytes a demonstration"],
        ["a shard in a manifest of targets", f"{m.entry_bytes:,.0f} bytes"],
    ]
    return table(["", "one core"], rows)


def shards(root: Path) -> str:
    """The same shards by an array and by Ray, with and without trouble."""
    calm = Trouble(SHARDS, WORKERS, mean_life=float("inf"), at_a_file=0, never_back=0, twins=0)
    rough = Trouble(SHARDS, WORKERS)
    wanted = run_undisturbed(root / "undisturbed", SHARDS)
    names = {
        "array": ("array-calm", run_array(root / "array-calm", calm, 20_000, 0.0005)),
        "array, workers fail": ("array", run_array(root / "array", rough, 20_000, 0.0005)),
        "Ray": ("ray-calm", run_ray(root / "ray-calm", calm)),
        "Ray, workers fail": ("ray", run_ray(root / "ray", rough)),
        "Ray, and a machine of 8 is broken": ("ray-bad", run_ray(root / "ray-bad", rough, 8)),
    }
    head = [
        "", "makespan", "ideal", "failures", "work lost", "made", "same bytes", "file operations",
    ]  # fmt: skip
    return table(
        head,
        [
            [
                name,
                *_outcome(outcome, rough.ideal()),
                str(folder_hash(root / at) == wanted),
                f"{outcome.operations.total() / SHARDS:,.1f} a shard",
            ]
            for name, (at, outcome) in names.items()
        ],
    )


def _outcome(outcome: Outcome, ideal: float) -> list[str]:
    seconds = f"{outcome.seconds:,.0f} s"
    if outcome.first_seconds < outcome.seconds:
        seconds += f" (first array: {outcome.first_seconds:,.0f} s)"
    lost = f"{outcome.lost:,.0f} GPU s"
    made = f"{outcome.made:,} of {SHARDS:,}" if outcome.made else "not counted"
    return [seconds, f"{ideal:,.0f} s", str(outcome.deaths), lost, made]


def requests() -> str:
    """What arrays ask of an S3 store."""
    rows = []
    with s3_server() as address:
        lead_to(address)
        Bucket(address)
        for number, tasks in ((8, 2), (16, 2), (16, 4)):
            fresh, late = array_requests(f"{number}-{tasks}", number, tasks)
            cells = [f"{each.total()} ({each['LIST']} lists)" for each in (fresh, late)]
            rows.append([str(number), str(tasks), *cells])
    return table(["shards", "tasks", "requests of all tasks", "requests of a restarted task"], rows)


def streams(root: Path) -> str:
    """An epoch with deaths and other numbers of ranks, and what a rank reads."""
    stream = make_folder(root / "stream", ROWS)
    whole = [example.id for example in stream.samples(0, range(ROWS))]
    attempts = [Attempt(1000, 3), Attempt(992, 2), Attempt(500, 1), Attempt(1000)]
    steps, in_vain, _ = read_epoch(stream, attempts, STEP)
    consumed = [row for step in steps for row in step]
    rows = [
        ["ranks, one after the other", ", ".join(str(each.ranks) for each in attempts)],
        ["samples of the epoch", f"{len(consumed):,}, each once: {len(set(consumed)) == ROWS}"],
        ["in the order of an undisturbed run", str(consumed == whole)],
        ["read again after a failure", f"{in_vain:,}"],
    ]
    for ranks in (1, 8, 64, 1000):
        read = read_by_one(stream, ranks, 8)
        name = f"rows read for each that is used, {ranks:,} ranks"
        rows.append([name, f"{read.amplification:.0f}"])
    return table(["", ""], rows)


def between(text: str, mark: str, new: str) -> str:
    """A text with something new between two marks."""
    start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    before, rest = text.split(start)
    return f"{before}{start}{new}{end}{rest.split(end)[1]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def size(count: float) -> str:
    """Bytes in a unit that suits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def span(seconds: float) -> str:
    """Seconds in a unit that suits."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


if __name__ == "__main__":
    main()
