"""Whether the memory of `qpipe score` stays flat, however many demonstrations there are.

    python tests/benchmarks/memory.py MODEL

MODEL is a tiny model, such as the tests make. `--plan` over 200,000 demonstrations against 20,000,
and scoring 20,000 short ones with transformers against 2,000; each in a process of its own, whose
peak is the kernel's VmHWM.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qpipe.stages.commands.tables import print_table

PLANNED = int(os.environ.get("PLANNED", "200000"))
SCORED = int(os.environ.get("SCORED", "20000"))
CHILD = """
import runpy, sys
sys.argv = ["qpipe", *sys.argv[1:]]
try:
    runpy.run_module("qpipe.stages", run_name="__main__")
except SystemExit as error:
    assert not error.code, error.code
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def main(model: Path) -> None:
    """Measure and print."""
    rows = [("", "demonstrations", "peak MiB", "a tenth of them", "ratio")]
    with tempfile.TemporaryDirectory() as folder:
        for name, most in (("plan", PLANNED), ("score", SCORED)):
            peaks = [peak(Path(folder), name, model, count) for count in (most, most // 10)]
            cells = [f"{each:.0f}" for each in peaks]
            rows.append((name, f"{most:,}", *cells, f"{peaks[0] / peaks[1]:.3f}"))
    print_table(rows)


def peak(folder: Path, name: str, model: Path, count: int) -> float:
    """Peak MiB of one run of the command."""
    chats = folder / f"{count}.jsonl"
    with chats.open("w") as file:
        for number in range(count):
            turns = [("user", f"What is {number}?"), ("assistant", f"It is {number % 97}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    words = ["score", "--model", str(model), "--demonstrations", str(chats)]
    if name == "plan":
        words += ["--plan"]
    else:
        words += ["--engine", "transformers", "--top-k", "8", "--out", str(folder / f"out-{count}")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return int(done.stdout.splitlines()[-1]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
