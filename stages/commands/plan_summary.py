"""What `qpipe score --plan` says, as a few aligned lines, and as JSON for machines."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..looking.token_text import escaped, one_line_of
from .tables import print_table

if TYPE_CHECKING:
    from ...pipeline.format.records import Reject
    from ..score.costs import Costs
    from ..score.plan import Memory, ScorePlan, Workload


def print_plan(plan: "ScorePlan") -> None:
    """What `qpipe score` would do."""
    memory = plan.memory
    print_table(
        [
            *_workload_rows(plan.workload),
            ("scores", f"about {_size(plan.folder_bytes)}"),
            (
                "model",
                f"{plan.model} in {plan.dtype}: {_size(memory.weights)} of weights on each GPU, "
                f"{_size(memory.kv_cache)} of KV cache for what is in flight",
            ),
            *_memory_rows(memory),
            *_cost_rows(plan.costs),
        ]
    )
    if not memory.fits and memory.engine is not None:
        click.echo(
            f"Warning: weights, KV cache and activations take about {_size(memory.engine.needed)} "
            "of each GPU, more than vLLM's share: use more --tensor-parallel-size or a larger GPU",
            err=True,
        )


def _workload_rows(work: "Workload") -> list[tuple[str, str]]:
    first = work.first_reject
    lengths = {0.0: "shortest", 0.5: "median", 1.0: "longest"}
    quantiles = [
        f"{lengths.get(share, f'{share:.0%}')} {length:,}"
        for share, length in work.lengths.quantiles().items()
    ]
    return [
        (
            "demonstrations",
            f"{work.read:,} read, {work.examples:,} to score, {work.rejected:,} "
            f"rejected, {work.cut:,} cut to the limit",
        ),
        *([("the first", _told(first))] if first else []),
        ("tokens", f"{work.tokens:,}, {work.positions:,} of them supervised"),
        ("lengths", ", ".join(quantiles)),
    ]


def _told(reject: "Reject") -> str:
    return f"{reject.source}, line {reject.line}: {escaped(one_line_of(reject.reason))}"


def _memory_rows(memory: "Memory") -> list[tuple[str, str]]:
    engine = memory.engine
    if engine is None or memory.gpu is None or memory.peak is None:
        return []
    return [
        (
            "vLLM",
            f"{engine.scheduled_tokens:,} tokens a step (max_num_batched_tokens), "
            f"{engine.utilization:.1%} of the GPU planned with",
        ),
        (
            "GPU memory",
            f"up to {_size(memory.peak)} of {_size(memory.gpu)}, "
            f"{_size(engine.added)} of it for prompt log-probabilities outside of vLLM's share",
        ),
    ]


def _cost_rows(costs: "Costs | None") -> list[tuple[str, str]]:
    """What scoring takes, and what then comes of it."""
    if costs is None:
        return []
    from ..score.costs import EPOCH, TRAINED_WEIGHT_BYTES, UTILIZATION

    throughput = costs.throughput
    basis = (
        f"{costs.flop:.2g} FLOP at {UTILIZATION:.0%} of {throughput.tflops:g} TFLOP/s, which is "
        "assumed: --gpu-speed takes what you measured"
        if throughput.speed is None
        else f"at the {throughput.speed:,.0f} supervised tokens/s of a GPU that you gave"
    )
    return [
        ("scoring", f"{_hours(costs.score_hours)}: {basis}"),
        ("targets", f"about {_size(costs.targets_bytes)}, of a method that stores a distribution"),
        (
            "training",
            f"{_hours(costs.epoch_hours)} an epoch of this model, {EPOCH} times scoring; "
            f"{_size(costs.training_bytes)} of GPU memory over all, {TRAINED_WEIGHT_BYTES} bytes a "
            "weight, activations besides",
        ),
    ]


def _hours(hours: float) -> str:
    """GPU hours in two digits."""
    if hours < 1 / 60:
        return "below a GPU minute"
    return f"about {hours:,.0f} GPU hours" if hours >= 10 else f"about {hours:.2g} GPU hours"


def plan_event(plan: "ScorePlan") -> dict[str, Any]:
    """A plan as a JSON value."""
    work = asdict(plan.workload)
    work["lengths"] = {str(share): n for share, n in plan.workload.lengths.quantiles().items()}
    event = {"event": "plan", "stage": "score", **asdict(plan), "workload": work}
    event["memory"] |= {"peak": plan.memory.peak, "fits": plan.memory.fits}
    return event


def _size(size: float) -> str:
    """Bytes in the unit that gives them one to three digits before the point."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1000 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.3g} {unit}"
