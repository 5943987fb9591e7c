"""The words of `qpipe score`."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ...pipeline.errors import option_of
from .options import (
    FOLDER,
    Command,
    Number,
    config_option,
    execution_options,
    one_of,
    out_options,
    take_execution,
    take_place,
)


@click.command(cls=Command)
@click.option("--model", required=True, help="Base model: a folder, or a name on the hub.")
@click.option(
    "--demonstrations",
    multiple=True,
    metavar="FILE...",
    help="JSON lines (also .gz, .zst), parquet, Arrow, or a Hugging Face data set name or folder.",
)
@click.option(
    "--at",
    type=FOLDER,
    default=None,
    metavar="DIR",
    help="Instead of demonstrations: the examples of this score folder, made with the same "
    "tokenizer; also stores this model's log-probabilities at the ids it holds.",
)
@out_options
@click.option(
    "--engine",
    type=one_of("auto", "vllm", "transformers", "server"),
    default="auto",
    help="What runs the model; auto is vLLM where it is installed. A server needs --server-url, "
    "and of --model the tokenizer and configuration alone.",
)
@click.option("--top-k", type=int, default=64, help="Entries kept of each distribution.")
@click.option(
    "--max-length",
    type=int,
    default=None,
    metavar="TOKENS",
    help="Longest demonstration.  [default: the model's limit, at most 4096]",
)
@click.option(
    "--too-long",
    type=one_of("reject", "cut"),
    default="reject",
    help="What happens to a longer one; either is counted.",
)
@click.option(
    "--format",
    "format",
    default="auto",
    type=one_of("auto", "messages", "sharegpt", "alpaca", "prompt-completion"),
    help="What a row looks like; auto recognises it row by row.",
)
@click.option(
    "--template",
    default="tokenizer",
    metavar="tokenizer|none|FILE",
    help="Chat template: the tokenizer's own, none, or a Jinja file.",
)
@click.option(
    "--date",
    default=None,
    metavar="YYYY-MM-DD",
    help="What a template that writes today's date takes it for.  [default: today, or the day that "
    "the folder was begun with; with --store there is none]",
)
@click.option(
    "--supervise",
    type=one_of("assistant", "last", "all"),
    default="assistant",
    help="Which tokens count: every assistant turn, the last one, or all tokens.",
)
@click.option("--strict", is_flag=True, help="Stop at the first unusable row.")
@click.option(
    "--dtype",
    type=one_of("auto", "float32", "bfloat16", "float16"),
    default="auto",
    help="Number format; auto is the model's own on a GPU and float32 without.",
)
@click.option("--revision", default=None, help="Branch, tag or commit of a model on the hub.")
@click.option("--shard-size", type=int, default=512, help="Demonstrations in a shard.")
@click.option(
    "--tensor-parallel-size",
    type=int,
    default=1,
    help="GPUs that share each layer of the model (vLLM).",
)
@click.option(
    "--pipeline-parallel-size",
    type=int,
    default=1,
    help="Groups of such GPUs that share the layers out (vLLM).",
)
@click.option(
    "--gpu-memory-utilization",
    type=float,
    default=0.8,
    help="Share of the GPU's memory that vLLM plans with, at most: prompt log-probabilities come "
    "on top of it.",
)
@click.option(
    "--plan",
    is_flag=True,
    help="Only read the demonstrations, and tell what scoring and training would take: tokens, GPU "
    "hours, memory, disk. Fetches no weights and writes nothing.",
)
@click.option(
    "--gpu-memory",
    type=Number(min=0, min_open=True),
    default=None,
    metavar="GIB",
    help="With --plan: what vLLM would take of a GPU of this size.",
)
@click.option(
    "--gpu-tflops",
    type=Number(min=0, min_open=True),
    default=None,
    metavar="N",
    help="With --plan: a GPU's peak, of which 40 % are reckoned with.  [default: 989, an H100's]",
)
@click.option(
    "--gpu-speed",
    type=Number(min=0, min_open=True),
    default=None,
    metavar="N",
    help="With --plan, instead: supervised tokens a second that a GPU scores, as you measured it.",
)
@click.option(
    "--server-url",
    default=None,
    metavar="URL",
    help="A vLLM server, started with --max-logprobs -1, as in http://host:8000. VLLM_API_KEY in "
    "the environment is sent along.",
)
@click.option(
    "--server-model",
    default=None,
    metavar="NAME",
    help="What the model is called there.  [default: the only one that it serves]",
)
@click.option("--server-requests", type=int, default=32, help="Requests under way at a time.")
@click.option(
    "--server-timeout",
    type=float,
    default=600.0,
    metavar="SECONDS",
    help="How long an answer may take; a late or failed request is tried again.",
)
@execution_options
@config_option
@click.pass_context
def score(
    ctx: click.Context,
    demonstrations: tuple[str, ...],
    at: Path | None,
    plan: bool,
    **options: Any,
) -> None:
    """Score demonstrations under a base model's prior.

    Needs a model and demonstrations. For every supervised token it stores the token's
    log-probability and rank, the top-k ids and log-probabilities, and the mass outside them. A row
    that cannot be used goes to rejects.jsonl with its file, line and reason.

    With --at, a second model scores the very examples of a score folder, at its ids too, so that
    the two can be joined. How rows are read is then that folder's, and no option here.

    \b
    qpipe score --model Qwen/Qwen3-0.6B --demonstrations chats.jsonl --out scores/
    qpipe score --model Qwen/Qwen3-8B --at scores/ --out teacher/
    qpipe score --model Qwen/Qwen3-8B --demonstrations chats.jsonl --plan --gpu-memory 80
    """
    gpu = {name: options.pop(name) for name in ("gpu_memory", "gpu_tflops", "gpu_speed")}
    if plan:
        _plan(ctx, demonstrations, options, **gpu)
        return
    for name in (name for name, value in gpu.items() if value is not None):
        option = option_of(name)
        raise click.UsageError(f"{option} goes with --plan: leave it out, or add --plan", ctx)
    from ..score.from_demonstrations import ScoreSettings, score
    from ..score.from_folder import ScoreAtSettings, score_at
    from .folder_summary import report

    take_place(options)
    execution = take_execution(options)
    if at is not None:
        settings = ScoreAtSettings(at=at, **_without_row_options(ctx, options))
        result = score_at(settings, execution)
    elif demonstrations:
        result = score(ScoreSettings(demonstrations=demonstrations, **options), execution)
    else:
        raise click.UsageError("give --demonstrations FILE, or --at DIR", ctx)
    report(options["out"], options["in_store"], result, execution.log_json)


def _plan(
    ctx: click.Context,
    demonstrations: tuple[str, ...],
    options: dict[str, Any],
    gpu_memory: float | None,
    gpu_tflops: float | None,
    gpu_speed: float | None,
) -> None:
    from ...pipeline.progress import log_event
    from ..score.costs import H100_TFLOPS, Throughput
    from ..score.from_demonstrations import ScoreSettings
    from ..score.plan import plan
    from .plan_summary import plan_event, print_plan

    if not demonstrations or ctx.params["at"] is not None:
        raise click.UsageError("--plan reads --demonstrations FILE: give one, and no --at", ctx)
    del options["store"]
    options["out"] = Path()  # nothing is written
    execution = take_execution(options)
    settings = ScoreSettings(demonstrations=demonstrations, **options)
    throughput = Throughput(gpu_tflops or H100_TFLOPS, gpu_speed)
    result = plan(settings, gpu_memory, throughput)
    print_plan(result)
    log_event(execution.log_json, **plan_event(result))


def _without_row_options(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `score` but those that say how rows are read, which nobody may have given."""
    from ..score.stage import MODEL_OPTIONS

    kept = {}
    for name in ("demonstrations", *options):
        if name in MODEL_OPTIONS:
            kept[name] = options[name]
        elif ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = option_of(name)
            raise click.UsageError(
                f"{option} goes with --demonstrations, not with --at: leave one of them out", ctx
            )
    return kept
