"""`qpipe score`: options, call, output."""

from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...pipeline.errors import escaped, option_of
from ...pipeline.options import described
from ..engines.settings import EngineSettings, ServerSettings
from ..execution.settings import Execution
from ..score.settings import RowSettings, ScoreSettings
from .options import (
    Command,
    Number,
    config_option,
    execution_options,
    options_of,
    out_options,
    take,
    take_place,
)
from .tables import print_table

if TYPE_CHECKING:
    from ...pipeline.format.records import Reject
    from ..score.plan import Costs, Memory, ScorePlan, Workload

_FIRST = ("model", "demonstrations", "at", "context")
_BINDS = {
    "step": "the largest step in use",
    "share": "--gpu-memory-utilization keeps the step from being larger",
    "memory": "the GPU's memory keeps the step from being larger",
}


@click.command(cls=Command)
@options_of(ScoreSettings, RowSettings, only=_FIRST)
@out_options
@options_of(ScoreSettings, RowSettings, EngineSettings, without=_FIRST)
@click.option(
    "--plan",
    is_flag=True,
    help="Read the demonstrations and estimate the cost of scoring and training: tokens, "
    "GPU hours, memory, disk. Downloads no weights and writes nothing.",
)
@click.option(
    "--show",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Print the first N demonstrations with the supervised part in ⟦ ⟧, and score nothing.",
)
@click.option(
    "--gpu-memory",
    type=Number(min=1, max=10**6),
    default=None,
    metavar="GIB",
    help="Memory of a GPU. Estimates what vLLM would use of it (with --plan).",
)
@click.option(
    "--gpu-tflops",
    type=Number(min=0.001, max=10**9),
    default=None,
    metavar="N",
    help="Peak TFLOP/s of a GPU, of which 40 % are assumed to be reached (with --plan).  "
    "[default: 989, an H100]",
)
@click.option(
    "--gpu-speed",
    type=Number(min=0.001, max=10**9),
    default=None,
    metavar="N",
    help="Measured number of supervised tokens per second on a GPU; replaces --gpu-tflops "
    "(with --plan).",
)
@options_of(ServerSettings)
@execution_options
@config_option
@click.pass_context
def score(ctx: click.Context, plan: bool, show: int | None, **options: Any) -> None:
    """Score demonstrations under a base model.

    For every supervised position, stores the log-probability and rank of the observed token,
    the top-k ids and log-probabilities, and the tail mass. Rows that cannot be used are written
    to rejects.jsonl with file, line and reason.

    With --at, a second model scores the examples of an existing score folder, also at the ids
    stored there, so that the two folders can be joined. Options that control how rows are read
    do not apply, except with --context: it puts a prompt of the teacher's own in front.

    \b
    qpipe score --model Qwen/Qwen3-0.6B --demonstrations chats.jsonl --out scores/
    qpipe score --model Qwen/Qwen3-8B --at scores/ --out teacher/
    qpipe score --model Qwen/Qwen3-0.6B --at scores/ --demonstrations chats.jsonl
        --context 'The answer is {{ answer }}.' --out hinted/
    qpipe score --model Qwen/Qwen3-8B --demonstrations chats.jsonl --show 3
    qpipe score --model Qwen/Qwen3-8B --demonstrations chats.jsonl --plan --gpu-memory 80
    """
    gpu = {name: options.pop(name) for name in ("gpu_memory", "gpu_tflops", "gpu_speed")}
    if show is not None:
        _show(ctx, dict(options), show)
    if plan:
        _plan(ctx, options, gpu)
    if plan or show is not None:
        return
    for name, value in gpu.items():
        if value is not None:
            option = option_of(name)
            raise click.UsageError(f"{option} requires --plan: give both, or leave it out", ctx)
    from ..execution.own_gpus import take_own_gpus
    from .folder_summary import report

    take_place(options)
    execution = take(Execution, options)
    if options["at"] is not None:
        _refuse_row_options(ctx, has_context=options["context"] is not None)
        from ..score.from_folder import score_at as run
    elif options["demonstrations"]:
        from ..score.from_demonstrations import score as run
    else:
        raise click.UsageError("give either --demonstrations FILE or --at DIR", ctx)
    settings = _settings(options)
    take_own_gpus(execution, settings.engine.gpus)
    report(settings.out, settings.in_store, run(settings, execution), execution.log_json)


def _settings(options: dict[str, Any]) -> ScoreSettings:
    engine = take(EngineSettings, options, server=take(ServerSettings, options))
    return ScoreSettings(rows=take(RowSettings, options), engine=engine, **options)


def _show(ctx: click.Context, options: dict[str, Any], count: int) -> None:
    from ..score.show import show

    for text in show(_without_folder(ctx, "--show", options), count):
        click.echo(text)


def _without_folder(ctx: click.Context, name: str, options: dict[str, Any]) -> ScoreSettings:
    """The settings of an option that looks at demonstrations and writes nothing."""
    if not options["demonstrations"] or options["at"] is not None:
        raise click.UsageError(f"{name} requires --demonstrations FILE and excludes --at", ctx)
    del options["store"]
    options["out"] = Path()  # unused
    take(Execution, options)
    return _settings(options)


def _plan(ctx: click.Context, options: dict[str, Any], gpu: dict[str, float | None]) -> None:
    from ...pipeline.progress import log_event
    from ..score.plan import H100_TFLOPS, Throughput, plan

    log_json = options["log_json"]
    settings = _without_folder(ctx, "--plan", options)
    throughput = Throughput(gpu["gpu_tflops"] or H100_TFLOPS, gpu["gpu_speed"])
    result = plan(settings, gpu["gpu_memory"], throughput)
    print_plan(result)
    log_event(log_json, **plan_event(result))


def _refuse_row_options(ctx: click.Context, has_context: bool) -> None:
    """Refuse options about rows, which --at takes from its folder; with a context its shards'."""
    for each in described(RowSettings):
        if has_context and each.name != "shard_size":
            continue
        if ctx.get_parameter_source(each.name) is not ParameterSource.DEFAULT:
            option = option_of(each.name)
            excluded = "--context" if has_context else "--at"
            raise click.UsageError(
                f"{option} requires --demonstrations and excludes {excluded}: leave one out", ctx
            )


def print_plan(plan: "ScorePlan") -> None:
    """Print the estimates of `qpipe score --plan`."""
    memory = plan.memory
    print_table(
        [
            *_workload_rows(plan.workload),
            ("scores", f"about {_size(plan.folder_bytes)}"),
            (
                "model",
                f"{plan.model} in {plan.dtype}: {_weights(memory.weights)} on each GPU, "
                f"{_size(memory.kv_cache)} of KV cache for what is in flight",
            ),
            *_memory_rows(memory),
            *_cost_rows(plan.costs),
        ]
    )
    engine = memory.engine
    if engine is not None and not memory.fits:
        way_out = "use more --tensor-parallel-size or a larger GPU"
        if engine.binds == "share":
            share = ceil(100 * engine.least_utilization) / 100
            way_out = f"give --gpu-memory-utilization {share:.2f}"
        click.echo(
            f"Warning: weights, KV cache and activations take {engine.least_utilization:.1%} of "
            f"each GPU, more than vLLM's share of {engine.utilization:.1%}: {way_out}",
            err=True,
        )


def _weights(size: int | None) -> str:
    return "weights of unknown size" if size is None else f"up to {_size(size)} of weights"


def _workload_rows(work: "Workload") -> list[tuple[str, str]]:
    from .folder_summary import empty_answers

    first = work.first_reject
    lengths = {0.0: "shortest", 0.5: "median", 1.0: "longest"}
    quantiles = [
        f"{lengths.get(share, f'{share:.0%}')} {length:,}"
        for share, length in work.quantiles.items()
    ]
    return [
        (
            "demonstrations",
            f"{work.read:,} read, {work.examples:,} to score, {work.rejected:,} "
            f"rejected, {work.cut:,} cut to the limit",
        ),
        *empty_answers(work.empty_answers),
        *([("the first", _reject_words(first))] if first else []),
        ("tokens", f"{work.tokens:,}, {work.positions:,} of them supervised"),
        ("lengths", ", ".join(quantiles)),
    ]


def _reject_words(reject: "Reject") -> str:
    from ..looking.token_text import one_line_of

    return f"{reject.source}, line {reject.line}: {escaped(one_line_of(reject.reason))}"


def _memory_rows(memory: "Memory") -> list[tuple[str, str]]:
    engine = memory.engine
    if engine is None or memory.gpu is None or memory.peak is None:
        return []
    return [
        (
            "vLLM",
            f"model runner {engine.runner}, {engine.scheduled_tokens:,} tokens a step "
            f"(max_num_batched_tokens), {engine.utilization:.1%} of the GPU's memory; "
            f"{_BINDS[engine.binds]}",
        ),
        (
            "GPU memory",
            f"up to {_size(memory.peak)} of {_size(memory.gpu)}, "
            f"{_size(engine.added)} of it for prompt log-probabilities outside vLLM's share",
        ),
    ]


def _cost_rows(costs: "Costs | None") -> list[tuple[str, str]]:
    """Rows for the cost of scoring, and of training on targets."""
    if costs is None:
        return []
    from ..score.plan import EPOCH, TRAINED_WEIGHT_BYTES, UTILIZATION

    throughput = costs.throughput
    basis = (
        f"{costs.flop:.2g} FLOP at {UTILIZATION:.0%} of {throughput.tflops:g} TFLOP/s, which is "
        "an assumption: give a measured speed with --gpu-speed"
        if throughput.speed is None
        else f"at the given {throughput.speed:,.12g} supervised tokens/s of a GPU"
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
    """GPU hours with two digits."""
    if hours < 1 / 60:
        return "below a GPU minute"
    return f"about {hours:,.0f} GPU hours" if hours >= 10 else f"about {hours:.2g} GPU hours"


def plan_event(plan: "ScorePlan") -> dict[str, Any]:
    """A plan as a JSON event."""
    from msgspec import to_builtins

    work = asdict(plan.workload)
    work["first_reject"] = to_builtins(plan.workload.first_reject)
    work["lengths"] = {str(share): n for share, n in plan.workload.quantiles.items()}
    event = {"event": "plan", "stage": "score", **asdict(plan), "workload": work}
    event["memory"] |= {"peak": plan.memory.peak, "fits": plan.memory.fits}
    return event


def _size(size: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1000 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.3g} {unit}"
