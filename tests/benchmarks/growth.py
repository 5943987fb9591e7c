"""How the cost of each part grows with the data.

    python tests/benchmarks/growth.py MODEL TINY [PART ...]

MODEL is a real model's folder, TINY one such as the tests make. The parts, all of them where none
is named:

- demonstrations: the stages and an epoch's stream over 200, 2,000 and 20,000 short ones, in
  microseconds a demonstration: flat, but for what a stage costs once;
- vocabulary: the fused loss, with its gradients, over 32k to 256k tokens: in proportion, its memory
  flat but for the head's own gradient;
- k: what scores of 8 to 256 entries take: bytes, building targets, the engine's front end;
- length: scoring and a training step over the same number of tokens in examples of 128 to 8,192.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.records import Example, TargetExample, WeightedExample
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.commands.tables import print_table
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.settings import EngineSettings
from qpipe.stages.folders.verify import verify
from qpipe.stages.score.from_demonstrations import score
from qpipe.tests.benchmarks.build_targets import make_scores
from qpipe.tests.benchmarks.figures import timed
from qpipe.tests.support.settings import score_settings
from qpipe.trainer.models.files import find_model, load_model

DEMONSTRATIONS = (200, 2_000, 20_000)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
TOP_KS = (8, 32, 64, 128, 256)
LENGTHS = (128, 512, 2_048, 8_192)
LENGTH_TOKENS = 8_192  # in all, of examples of any length
_LOSS = """
import sys, time, torch
from qpipe.pipeline.methods import choose
from qpipe.trainer.data.batch import SparseTargets
from qpipe.trainer.loss.fused import fused_loss
from qpipe.trainer.loss.head import Head
from qpipe.trainer.loss.objective import Objective
N, V, D, S = 1024, int(sys.argv[1]), 256, 32
hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D).mul_(0.02)
weight.requires_grad_()
observed = torch.randint(0, V, (N,))
ids = torch.stack([torch.randperm(V)[:S].clone() for _ in range(N)])
ids[:, 0] = observed
targets = SparseTargets(observed, torch.zeros(N, dtype=torch.long), torch.full((N,), 0.9),
    torch.ones(N), ids, torch.ones(N, S, dtype=torch.bool), torch.full((N, S), 0.98 / S),
    torch.full((N,), 0.02))
objective = Objective(choose("sft+kl"), "student", "base")
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before, times = peak(), []
for _ in range(4):
    start = time.perf_counter()
    fused_loss(hidden, Head(weight), targets, objective).sum.backward()
    times.append(time.perf_counter() - start)
    hidden.grad = weight.grad = None
print(sorted(times[1:])[1] / N * 1e6, (peak() - before) / 1024, V * D * 4 / 2**20)
"""


def main(model: Path, tiny: Path, parts: list[str]) -> None:
    """Print a table for each part."""
    known: dict[str, Callable[[], None]] = {
        "demonstrations": lambda: grow_demonstrations(tiny),
        "vocabulary": grow_vocabulary,
        "k": grow_top_k,
        "length": lambda: grow_length(model),
    }
    for part in parts or known:
        print(f"\n{part}\n")
        known[part]()


def grow_demonstrations(model: Path) -> None:
    """Microseconds a demonstration of each stage."""
    rows = [("demonstrations", "score", "build-targets", "verify", "open a stream", "an epoch")]
    with tempfile.TemporaryDirectory() as folder:
        for count in DEMONSTRATIONS:
            seconds = stages(model, Path(folder) / str(count), count)
            rows.append((f"{count:,}", *(f"{each / count * 1e6:,.0f} µs" for each in seconds)))
    print_table(rows)


def stages(model: Path, folder: Path, count: int) -> list[float]:
    """Seconds of each stage over so many short demonstrations, an engine's start left out."""
    from qpipe.trainer.data.stream import open_streams

    folder.mkdir()
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(count):
            turns = [("user", f"What is {number}?"), ("assistant", f"It is {number % 97}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    scoring = score_settings(
        model=str(model),
        demonstrations=(str(folder / "chats.jsonl"),),
        out=folder / "scores",
        engine="transformers",
        top_k=16,
    )
    building = BuildSettings(folder / "scores", folder / "targets", choose("sft+kl"))
    scored = score(scoring).seconds
    built = timed(lambda: build_targets(building))
    verified = timed(lambda: list(verify(folder / "targets")))
    streams: list[Any] = []

    def opening() -> None:
        streams.append(open_streams(open_sealed(folder / "targets"), 0.0)[0])

    opened = timed(opening)
    epoch = timed(lambda: sum(1 for _ in streams[0].samples(0, range(count))))
    return [scored, built, verified, opened, epoch]


def grow_vocabulary() -> None:
    """Time and memory of the fused loss and its gradients."""
    rows = [("vocabulary", "a position", "for 1,024 of V", "peak MiB", "of it the head's gradient")]
    for vocab_size in VOCABULARIES:
        command = [sys.executable, "-c", _LOSS, str(vocab_size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        micros, peak, gradient = map(float, done.stdout.split())
        share = micros / vocab_size * 1024
        cells = f"{micros:,.0f} µs", f"{share:.2f} µs", f"{peak:,.0f}", f"{gradient:,.0f}"
        rows.append((f"{vocab_size:,}", *cells))
    print_table(rows)


def grow_top_k() -> None:
    """Bytes a token and microseconds a token."""
    from qpipe.tests.benchmarks.score import front_end

    rows = [("k", "scores", "targets", "build-targets", "front end")]
    with tempfile.TemporaryDirectory() as made:
        for top_k in TOP_KS:
            folder = Path(made) / str(top_k)
            make_scores(folder, "base", 1, top_k)
            targets = Path(made) / f"targets-{top_k}"
            settings = BuildSettings(folder, targets, choose("sft+kl"))
            seconds = timed(lambda settings=settings: build_targets(settings))
            manifests = read_manifest(folder), read_manifest(targets)
            positions = manifests[0].totals["positions"]
            rows.append(
                (
                    f"{top_k}",
                    *(f"{each.bytes_per_token:.0f} B/token" for each in manifests),
                    f"{seconds / positions * 1e6:.1f} µs",
                    f"{front_end(top_k):.2f} µs",
                )
            )
    print_table(rows)


def grow_length(model: Path) -> None:
    """Tokens a second, of examples of one length each, a quarter of it supervised."""
    import torch
    from qpipe.trainer.data.batch import padded_batch
    from qpipe.trainer.loss.objective import Objective
    from qpipe.trainer.models.student import Student

    files = find_model(str(model))
    scorer = make_scorer(files, EngineSettings("transformers", "float32", max_length=max(LENGTHS)))
    student = Student(load_model(files, torch.float32)).train()
    objective = Objective(choose("sft", "live"), "student", "none")
    rows = [("tokens an example", "score", "forward and backward")]
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        ids = [rng.integers(1, 40_000, length) for _ in range(LENGTH_TOKENS // length)]
        examples = [as_example(f"{i}", each) for i, each in enumerate(ids)]
        scoring = timed(lambda examples=examples: list(scorer.score(examples, 64)))
        batches = [padded_batch([as_target(each)]) for each in examples]

        def train(batches: list[Any] = batches) -> None:
            for batch in batches:
                student(batch, objective)[0].backward()
            student.zero_grad()

        training = timed(train)
        speeds = (f"{LENGTH_TOKENS / each:,.0f} tokens/s" for each in (scoring, training))
        rows.append((f"{length:,}", *speeds))
    print_table(rows)


def as_example(name: str, input_ids: Any) -> WeightedExample:
    """An example whose last quarter is supervised, with weights of one."""
    size = len(input_ids)
    positions = np.arange(size - size // 4, size, dtype=np.int32)
    weights = np.ones(len(positions), np.float32)
    return WeightedExample(name, input_ids.astype(np.int32), positions, weights)


def as_target(example: Example) -> TargetExample:
    """The example's own tokens as targets."""
    ones = np.ones(len(example.positions), np.float32)
    return TargetExample(
        id=example.id,
        input_ids=example.input_ids,
        positions=example.positions,
        trust=ones,
        counts=ones.astype(np.int32),
        support_ids=example.observed_ids,
        support_probs=ones,
        tail_mass=0 * ones,
        weights=ones,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
