"""What the parts share: where they run, how they report, how they measure."""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

REHEARSE = "--rehearse" in sys.argv
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OUT = Path(os.environ.get("OUT", "."))
BEGAN = time.time()


def report(**row: Any) -> None:
    """Print a result and keep it."""
    print(f"[{time.time() - BEGAN:5.0f} s]", *(f"{k}={v}" for k, v in row.items()), flush=True)
    with (OUT / "trainer.jsonl").open("a") as file:
        print(json.dumps(row), file=file)


def tried(part: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Report what `work` finds, or how it fails."""
    try:
        row = work()
    except Exception as error:
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    report(part=part, name=name, **row)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], runs: int = 7) -> float:
    """The median time of some runs, after three that warm up."""
    times = []
    for _ in range(3 + runs):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[3:])


def peak_gib(work: Callable[[], Any]) -> float:
    """Memory that the work takes at its peak, beyond what is there before."""
    if DEVICE.type != "cuda":
        work()
        return 0.0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
