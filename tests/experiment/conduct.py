"""The experiment itself: every run that is not recorded yet, those of the first seed first.

The starts go side by side, each on its share of the cores: two small models that train on a core
each are done sooner than one after the other on two.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from qpipe.pipeline.ceiling import ceilings, reproducible_share
from qpipe.pipeline.manifest import read_manifest
from qpipe.stages.summaries.folders import bytes_per_token

from .judge import judge
from .plan import (
    KEPT_START,
    KEPT_VARIANT,
    STARTS,
    VARIANTS,
    Run,
    Start,
    Variant,
    final_runs,
    kept_runs,
    reference_runs,
    search_runs,
)
from .processes import in_process
from .records import Records, best_learning_rate, is_right
from .work import Work


def conduct(work: Work, records: Records) -> None:
    """Do what is left. Models are removed as soon as no exam is left for them."""
    work.sample_unlike()
    with ThreadPoolExecutor(len(STARTS)) as pool:
        list(pool.map(partial(_sit, work, records), reference_runs()))
        list(pool.map(partial(_conduct_from, work, records), STARTS))


def _conduct_from(work: Work, records: Records, start: Start) -> None:
    """What is left of one start."""
    for seed in range(work.size.seeds):
        for variant in VARIANTS:
            learning_rate = _chosen(work, records, start, variant)
            for run in final_runs(start, variant, seed, learning_rate):
                _sit(work, records, run)
            work.forget_models(start)
    if start != KEPT_START:
        return
    learning_rate = _chosen(work, records, start, KEPT_VARIANT)
    for run in kept_runs(work.size, learning_rate):
        _sit(work, records, run)
        work.forget_models(start)


def _chosen(work: Work, records: Records, start: Start, variant: Variant) -> float:
    """A method's learning rate, searched for where that was not done."""
    runs = search_runs(work.size, start, variant)
    for run in runs:
        _sit(work, records, run)
    if not runs:
        return work.size.learning_rates[0]
    return best_learning_rate(records.of(runs), work.parts["validation"])


def _sit(work: Work, records: Records, run: Run) -> None:
    """Train a model, judge it and record it, unless that was done."""
    if run in records:
        return
    begin = time.perf_counter()
    model = work.model(run)
    trained = time.perf_counter()
    judged = in_process(work.log, judge, model, work.start(run.start), work.exam(run.exam))
    seconds = {"train": trained - begin, "judge": time.perf_counter() - trained}
    promised = _promised(work, run) if run.is_trained else {}
    records.add({**run.described(), **judged, **promised, "seconds": seconds})
    accuracy = is_right(judged, work.parts[run.exam]).mean()
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"{run.key}: accuracy {accuracy:.3f}, nll {judged['nll']:.3f} ({spent})", flush=True)


def _promised(work: Work, run: Run) -> dict[str, Any]:
    """What the run's targets can teach at best, and their size."""
    manifest = read_manifest(work.targets(run), "build-targets")
    sums = manifest.totals["sums"]
    overall = ceilings(sums)[0]
    return {
        "ceiling": {
            "nll": overall.nll,
            "learnable": overall.learnable,
            "starved": overall.starved,
            "divergence": overall.divergence,
            "reproducible": reproducible_share(sums, manifest.totals["rows"]),
        },
        "bytes_per_token": bytes_per_token(manifest),
    }
