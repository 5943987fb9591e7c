"""The words of `qpipe import` and `qpipe export`."""

from typing import Any

import click

from .options import FILE, FOLDER, Command, config_option, one_of


@click.command("import", cls=Command)
@click.argument("file", type=FILE)
@click.option(
    "--format",
    required=True,
    type=one_of("axolotl", "distillkit"),
    help="Whose layout the file has.",
)
@click.option("--model", required=True, help="The model that gave the log-probabilities.")
@click.option("--out", required=True, type=FOLDER, help="Folder to make.")
@click.option(
    "--mass",
    type=one_of("model", "top-k"),
    default=None,
    help="What a position's probabilities are: the model's own, the rest being its tail, or "
    "scaled to add up to 1.  [default: top-k for axolotl, model for distillkit]",
)
@click.option(
    "--top-k",
    type=int,
    default=None,
    help="Entries of a position that are surely its most probable.  [default: those of the first]",
)
@click.option("--revision", default=None, help="Branch, tag or commit of a model on the hub.")
@config_option
def import_(**options: Any) -> None:
    """Take log-probabilities that another tool computed, as a score folder.

    Reads a parquet file; needs the model's configuration and tokenizer, not its weights. The
    log-probabilities must be at temperature 1. A supervised token that is not among the entries of
    its position is left out and counted: its log-probability is not in the file. A row that cannot
    be used goes to rejects.jsonl with its reason.

    \b
    axolotl     input_ids, labels, target_token_ids, target_logprobs, target_mask
    distillkit  input_ids, and two columns of lists of lists: ids and log-probabilities

    \b
    qpipe import logprobs.parquet --format distillkit --model Qwen/Qwen3-8B --out scores/
    """
    from ..exchange.import_scores import ImportSettings, import_scores
    from .folder_summary import print_scores

    print_scores(options["out"], import_scores(ImportSettings(**options)))


@click.command("export", cls=Command)
@click.argument("scores", type=FOLDER)
@click.option("--format", required=True, type=one_of("axolotl"), help="Whose layout to write.")
@click.option("--out", required=True, type=FILE, help="Parquet file to make.")
@click.option(
    "--mass",
    type=one_of("model", "top-k"),
    default="top-k",
    help="Scale a position's probabilities to add up to 1, or leave them the model's own.",
)
@config_option
def export(format: str, **options: Any) -> None:
    """Write a score folder as a file for another tool to train on.

    axolotl's knowledge distillation takes it as a data set that is tokenised already; it divides by
    the mass of the top k itself unless `kd_normalize_topk` is off.

    \b
    qpipe export scores/ --format axolotl --out logprobs.parquet
    """
    from ..exchange.export_scores import ExportSettings, export_scores

    totals = export_scores(ExportSettings(**options)).totals
    click.echo(
        f"{options['out']}: {totals['rows']:,} demonstrations, {totals['positions']:,} supervised "
        "tokens"
    )
