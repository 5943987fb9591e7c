"""The words of `qpipe score`."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ...pipeline.errors import option_of
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

_FIRST = ("model", "demonstrations", "at")


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
    "--gpu-memory",
    type=Number(min=0, min_open=True),
    default=None,
    metavar="GIB",
    help="Memory of a GPU. Estimates what vLLM would use of it (with --plan).",
)
@click.option(
    "--gpu-tflops",
    type=Number(min=0, min_open=True),
    default=None,
    metavar="N",
    help="Peak TFLOP/s of a GPU, of which 40 % are assumed to be reached (with --plan).  "
    "[default: 989, an H100]",
)
@click.option(
    "--gpu-speed",
    type=Number(min=0, min_open=True),
    default=None,
    metavar="N",
    help="Measured number of supervised tokens per second on a GPU; replaces --gpu-tflops "
    "(with --plan).",
)
@options_of(ServerSettings)
@execution_options
@config_option
@click.pass_context
def score(ctx: click.Context, plan: bool, **options: Any) -> None:
    """Score demonstrations under a base model.

    For every supervised position, stores the log-probability and rank of the observed token,
    the top-k ids and log-probabilities, and the tail mass. Rows that cannot be used are written
    to rejects.jsonl with file, line and reason.

    With --at, a second model scores the examples of an existing score folder, also at the ids
    stored there, so that the two folders can be joined. Options that control how rows are read
    do not apply.

    \b
    qpipe score --model Qwen/Qwen3-0.6B --demonstrations chats.jsonl --out scores/
    qpipe score --model Qwen/Qwen3-8B --at scores/ --out teacher/
    qpipe score --model Qwen/Qwen3-8B --demonstrations chats.jsonl --plan --gpu-memory 80
    """
    gpu = {name: options.pop(name) for name in ("gpu_memory", "gpu_tflops", "gpu_speed")}
    if plan:
        _plan(ctx, options, **gpu)
        return
    for name in (name for name, value in gpu.items() if value is not None):
        option = option_of(name)
        raise click.UsageError(f"{option} goes with --plan: leave it out, or add --plan", ctx)
    from .folder_summary import report

    take_place(options)
    execution = take(Execution, options)
    if options["at"] is not None:
        _refuse_row_options(ctx)
        from ..score.from_folder import score_at as run
    elif options["demonstrations"]:
        from ..score.from_demonstrations import score as run
    else:
        raise click.UsageError("give --demonstrations FILE, or --at DIR", ctx)
    settings = _settings(options)
    report(settings.out, settings.in_store, run(settings, execution), execution.log_json)


def _settings(options: dict[str, Any]) -> ScoreSettings:
    engine = take(EngineSettings, options, server=take(ServerSettings, options))
    return ScoreSettings(rows=take(RowSettings, options), engine=engine, **options)


def _plan(
    ctx: click.Context,
    options: dict[str, Any],
    gpu_memory: float | None,
    gpu_tflops: float | None,
    gpu_speed: float | None,
) -> None:
    from ...pipeline.progress import log_event
    from ..score.costs import H100_TFLOPS, Throughput
    from ..score.plan import plan
    from .plan_summary import plan_event, print_plan

    if not options["demonstrations"] or options["at"] is not None:
        raise click.UsageError("--plan reads --demonstrations FILE: give one, and no --at", ctx)
    del options["store"]
    options["out"] = Path()  # nothing is written
    execution = take(Execution, options)
    throughput = Throughput(gpu_tflops or H100_TFLOPS, gpu_speed)
    result = plan(_settings(options), gpu_memory, throughput)
    print_plan(result)
    log_event(execution.log_json, **plan_event(result))


def _refuse_row_options(ctx: click.Context) -> None:
    """Refuse options about rows, which --at takes from its folder."""
    for each in described(RowSettings):
        if ctx.get_parameter_source(each.name) is not ParameterSource.DEFAULT:
            option = option_of(each.name)
            raise click.UsageError(
                f"{option} goes with --demonstrations, not with --at: leave one of them out", ctx
            )
