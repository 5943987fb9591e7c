"""How a training run went."""

from pathlib import Path
from typing import TYPE_CHECKING

from .tables import print_table

if TYPE_CHECKING:
    from ...trainer.run.result import TrainResult


def print_training(folder: Path, result: "TrainResult") -> None:
    """How a training run went."""
    already = "  (was there already, nothing to do)" if result.was_done else ""
    speed = result.tokens / max(result.seconds, 1e-9)
    rows = [
        ("model", f"{folder}{already}"),
        ("steps", f"{result.steps:,} over {result.examples:,} demonstrations"),
        ("supervised tokens", f"{result.tokens:,}"),
        ("speed", f"{speed:,.0f} supervised tokens/s"),
    ]
    for when, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            words = f"target loss {evaluation.target_loss:.4f}, NLL {evaluation.nll:.4f}"
            if evaluation.kl_to_base is not None:
                words += f", KL to base {evaluation.kl_to_base:z.4f}"
            words += f", entropy {evaluation.entropy:.4f}"
            rows.append((f"held out, {when}", words))
    print_table(rows)
