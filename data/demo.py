"""The program of `make demo`: runs the three commands on data/arithmetic.jsonl, prints a table.

    python data/demo.py MODEL FOLDER

Each command is printed as a user would type it. A second run does no work again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.stages.commands.tables import print_table

QPIPE = Path(sys.executable).with_name("qpipe")
DATA = Path("data/arithmetic.jsonl")
TRAINING = ("--eval-fraction", 0.2, "--learning-rate", 3e-5, "--batch-size", 8)


def run(*arguments: object) -> None:
    """Run one qpipe command, or stop with its exit status."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ qpipe {' '.join(words)}", flush=True)
    status = subprocess.run([QPIPE, *words], check=False).returncode
    if status:
        sys.exit(status)


def demo(model: Path, folder: Path) -> None:
    """Score, build targets, train on them, and train on the tokens alone for comparison."""
    folder.mkdir(exist_ok=True)
    scores, targets = folder / "scores", folder / "targets"
    log = ("--log-json", folder / "stages.jsonl")
    run("score", "--model", model, "--demonstrations", DATA, "--out", scores, *log)
    run("build-targets", "--scores", scores, "--out", targets, *log)
    train = ("train", "--targets", targets, "--model", model, *TRAINING)
    run(*train, "--out", folder / "run-soft")
    run(*train, "--out", folder / "run-sft", "--method", "sft")
    print_outcome(folder)


def print_outcome(folder: Path) -> None:
    """The table: what went in, what came out, and how fast."""
    scores, targets = read_manifest(folder / "scores"), read_manifest(folder / "targets")
    soft, sft = (
        json.loads((folder / name / "qpipe.json").read_text())["results"]
        for name in ("run-soft", "run-sft")
    )
    speeds = stage_speeds(folder / "stages.jsonl")
    totals = scores.totals
    print("\nStages")
    print_table(
        [
            ("demonstrations read", f"{totals['read']:,}"),
            ("  scored", f"{totals['rows']:,}"),
            ("  rejected", f"{totals['rejected']:,}"),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("kept mass", f"scores {scores.kept_mass:.4f}, targets {targets.kept_mass:.4f}"),
            (
                "bytes a token",
                f"scores {scores.bytes_per_token:.0f}, targets {targets.bytes_per_token:.0f}",
            ),
            (
                "supervised tokens/s",
                f"score {speeds['score']:,.0f}, build-targets {speeds['build-targets']:,.0f}, "
                f"train {soft['tokens'] / soft['seconds']:,.0f}",
            ),
        ]
    )
    method = targets.settings["method"]
    before = soft["before"]
    print(f"\nHeld-out demonstrations, in nats a token ({before['tokens']:,} tokens)")
    print_table(
        [
            ("", "loss (NLL)", "KL to the base"),
            ("before", *losses(before)),
            (f"after {method}", *losses(soft["after"])),
            ("after sft", *losses(sft["after"])),
        ]
    )
    print("\nOutput folders")
    print_table(
        [
            (f"{folder}/scores", "top-k log-probabilities under the base model"),
            (f"{folder}/targets", f"{method} targets"),
            (f"{folder}/run-soft", "model trained on them"),
            (f"{folder}/run-sft", "model trained on the tokens alone, same data order"),
        ]
    )


def losses(evaluation: dict[str, Any]) -> list[str]:
    """The cells of one evaluation."""
    return [f"{evaluation[name]:z.4f}" for name in ("nll", "kl_to_base")]


def stage_speeds(log: Path) -> dict[str, float]:
    """Supervised tokens a second of each stage's last run that made anything."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    made = [each for each in events if each["event"] == "done" and each["seconds"]]
    return {each["stage"]: each["positions"] / each["seconds"] for each in made}


if __name__ == "__main__":
    demo(Path(sys.argv[1]), Path(sys.argv[2]))
