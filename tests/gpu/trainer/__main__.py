"""The trainer on a GPU: is it right, what the loss takes, what a whole step takes.

    python -m qpipe.tests.gpu.trainer [--rehearse] [PART ...]

Without names all parts run, in the order of PARTS. Each reports its failures and lets the next run.
With --rehearse everything is small and runs anywhere: it shows that the parts work, not how fast.
Results are lines of JSON in $OUT/trainer.jsonl, or in the present folder.
"""

import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch

from .loss import loss, products
from .measure import DEVICE, report
from .steps import step
from .trace import trace
from .truth import right

PARTS: dict[str, Callable[[], None]] = {
    "right": right,
    "loss": loss,
    "products": products,
    "step-0.6B": partial(step, "0.6B"),
    "trace": trace,
    "step-1.7B": partial(step, "1.7B"),
}


def main() -> None:
    """Run the parts that are named, or all."""
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    report(part="machine", card=card, torch=torch.__version__)
    for name in [each for each in sys.argv[1:] if each in PARTS] or PARTS:
        try:
            PARTS[name]()
        except Exception as error:
            traceback.print_exc()
            report(part=name, failed=f"{type(error).__name__}: {str(error)[:300]}")


if __name__ == "__main__":
    main()
