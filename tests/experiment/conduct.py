"""The experiment itself: every run that is not recorded yet, those of the first seed first.

Two lanes go side by side, each on its share of the cores: two small models that train on a core
each are done sooner than one after the other on two.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.targets.ceiling import ceilings, reproducible_share

from .judge import judge
from .plan import (
    KEPT,
    KEPT_START,
    KEPT_VARIANT,
    LANES,
    STARTS,
    VARIANTS,
    Kept,
    Run,
    Start,
    Variant,
    final_runs,
    kept_run,
    reference_runs,
    search_runs,
)
from .processes import in_process
from .records import Records, best_learning_rate, is_right
from .work import Work


def conduct(work: Work, records: Records) -> None:
    """Do what is left. Models are removed as soon as no exam is left for them."""
    work.sample_unlike()
    seeds = range(work.size.seeds)
    methods = [
        partial(_conduct_method, work, records, start, variant, seed)
        for seed in seeds
        for variant in VARIANTS
        for start in STARTS
    ]
    kept = [partial(_conduct_kept, work, records, kept, seed) for kept in KEPT for seed in seeds]
    with ThreadPoolExecutor(LANES) as lanes:
        list(lanes.map(partial(sit, work, records), reference_runs()))
        list(lanes.map(lambda task: task(), [*methods, *kept]))


def _conduct_method(
    work: Work, records: Records, start: Start, variant: Variant, seed: int
) -> None:
    """What is left of a method from one start with one seed."""
    searches = search_runs(work.size, start, variant) if seed == 0 else []
    for run in searches:
        sit(work, records, run)
    learning_rate = _chosen(work, records, start, variant)
    exams = final_runs(work.size, start, variant, seed, learning_rate)
    for run in exams:
        sit(work, records, run)
    work.forget_models([*searches, *exams])


def _conduct_kept(work: Work, records: Records, kept: Kept, seed: int) -> None:
    """The run that keeps so much of each distribution."""
    run = kept_run(kept, seed, _chosen(work, records, KEPT_START, KEPT_VARIANT))
    sit(work, records, run)
    work.forget_models([run])


def _chosen(work: Work, records: Records, start: Start, variant: Variant) -> float:
    """A method's learning rate; the search for it comes with the first seed."""
    searches = search_runs(work.size, start, variant)
    if not searches:
        return work.size.learning_rates[0]
    return best_learning_rate(records.of(searches), work.parts["validation"])


def sit(work: Work, records: Records, run: Run) -> None:
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
        "bytes_per_token": manifest.bytes_per_token,
    }
