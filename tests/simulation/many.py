"""Plans and scores many tiny demonstrations: time in proportion, memory flat.

    python tests/simulation/many.py [COUNT ...]

The engine is a stand-in that takes no time, so the figures are those of qpipe itself: reading,
rendering, tokenising, packing, writing and sealing. Times are those of the processor.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.commands.tables import print_table
from qpipe.stages.engines.base import scored
from qpipe.tests.conftest import make_tiny_model

VOCAB_SIZE = 320
COUNTS = (10_000, 100_000, 1_000_000)
RUN = """
import sys, time
from pathlib import Path
from unittest.mock import patch
from qpipe.pipeline.folders.sealed import read_scores
from qpipe.stages.score import stage
from qpipe.stages.score.from_demonstrations import score
from qpipe.stages.score.plan import plan
from qpipe.tests.simulation.many import StandIn
from qpipe.tests.support.settings import score_settings

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

what, root = sys.argv[1], Path(sys.argv[2])
options = dict(model=str(root / "tiny"), out=root / "scores", engine="transformers", top_k=8,
    demonstrations=(str(root / "many.jsonl"),))
settings = score_settings(**options)
start = time.process_time()
with patch.object(stage, "make_scorer", lambda *_: StandIn()):
    if what == "plan":
        plan(settings)
    elif what == "score":
        score(settings)
    else:
        sum(1 for _ in read_scores(root / "scores"))
print(time.process_time() - start, peak())
"""


class StandIn:
    """A scorer without a model: every token is as likely as any other."""

    def score(
        self, examples: Sequence[WeightedExample], top_k: int, at: Any = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        for place, example in enumerate(examples):
            N = len(example.positions)
            ids_NK = np.tile(np.arange(top_k), (N, 1))
            logs_NK = np.full((N, top_k), -np.log(VOCAB_SIZE), np.float32)
            ranks_N = np.full(N, VOCAB_SIZE)
            yield place, scored(example, logs_NK[:, 0], ranks_N, ids_NK, logs_NK, VOCAB_SIZE)


def main(counts: list[int]) -> None:
    """Print a table: processor time, also for each demonstration, and peak memory."""
    rows = [["demonstrations", "step", "time", "each", "peak memory"]]
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            make_tiny_model(root / "tiny", vocab_size=VOCAB_SIZE)
            write_demonstrations(root / "many.jsonl", count)
            for what in ("plan", "score", "read"):
                seconds, megabytes = measured(what, root)
                each = f"{seconds / count * 1e6:.0f} µs"
                rows.append([f"{count:,}", what, f"{seconds:.1f} s", each, f"{megabytes:,} MB"])
    print_table(rows)


def write_demonstrations(path: Path, count: int) -> None:
    """Demonstrations of two words each, all of them different."""
    with path.open("w") as file:
        for number in range(count):
            question = {"role": "user", "content": f"{number}?"}
            answer = {"role": "assistant", "content": f"{number % 97}."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


def measured(what: str, root: Path) -> tuple[float, int]:
    """Seconds and megabytes of one step, in a process of its own."""
    command = [sys.executable, "-c", RUN, what, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, megabytes = done.stdout.split()[-2:]
    return float(seconds), int(megabytes)


if __name__ == "__main__":
    main([int(each.replace("_", "")) for each in sys.argv[1:]] or list(COUNTS))
