"""What one long demonstration takes: memory and time of each stage against its length.

    python tests/benchmarks/long.py [TOKENS ...]

A tiny random model (two layers, hidden size 64, vocabulary 320) scores a chat of so many tokens,
half of them supervised, with transformers; targets are built, and one step is trained with
`--gradient-checkpointing`. Each command runs in a process of its own, whose peak is the kernel's
VmHWM. The last columns are the memory beyond that of the shortest chat, for each further 1,000
tokens: it stays the same unless something grows faster than the length. The time of attention grows
with the square of it.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from qpipe.stages.commands.tables import print_table
from qpipe.tests.benchmarks.memory import CHILD
from qpipe.tests.conftest import make_tiny_model

LENGTHS = (2048, 8192, 32_768, 131_072)
STAGES = ("score", "build-targets", "train")
_TEMPLATE = 40  # tokens of the chat template, at most


def main(lengths: list[int]) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = make_tiny_model(folder / "model", vocab_size=320)
        config = json.loads((model / "config.json").read_text())
        config["max_position_embeddings"] = 2 * max(lengths)
        (model / "config.json").write_text(json.dumps(config))
        found = {length: [run(each) for each in commands(folder, length)] for length in lengths}
    units = ("s", "MiB", "MiB/1k")
    head = ["tokens", *(f"{stage}: {unit}" for stage in STAGES for unit in units)]
    rows = []
    for length, measured in found.items():
        rows.append([f"{length:,}"])
        for (seconds, peak), (_, least) in zip(measured, found[lengths[0]], strict=True):
            further = (length - lengths[0]) / 1000
            slope = f"{(peak - least) / further:.1f}" if further else ""
            rows[-1] += [f"{seconds:.1f}", f"{peak:.0f}", slope]
    print_table([head, *rows])


def commands(folder: Path, length: int) -> list[list[str]]:
    """The words of the three commands."""
    model, root = folder / "model", folder / f"{length}"
    root.mkdir()
    rng, half = random.Random(0), (length - _TEMPLATE) // 2
    prompt, answer = ("".join(rng.choices("0123456789", k=half)) for _ in range(2))
    turns = [("user", prompt), ("assistant", answer)]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (root / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    scores, targets = root / "scores", root / "targets"
    return [
        f"score --model {model} --demonstrations {root}/chat.jsonl --out {scores} --top-k 16 "
        f"--engine transformers --max-length {length}".split(),
        f"build-targets --scores {scores} --out {targets}".split(),
        f"train --targets {targets} --model {model} --out {root}/run --max-steps 1 "
        "--gradient-checkpointing".split(),
    ]


def run(words: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of one command."""
    start = perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return perf_counter() - start, int(done.stdout.split()[-1]) / 1024


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]] or list(LENGTHS))
