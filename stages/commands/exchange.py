"""`qpipe import` and `qpipe export`: options, call, output."""

from typing import Any

import click

from ..exchange.settings import ExportSettings, ImportSettings
from .options import FILE, FOLDER, Command, config_option, options_of


@click.command("import", cls=Command)
@click.argument("file", type=FILE)
@options_of(ImportSettings)
@config_option
def import_(**options: Any) -> None:
    """Import log-probabilities of another tool as a score folder.

    Reads a parquet file. Needs the configuration and tokenizer of the model, not its weights.
    The log-probabilities must be at temperature 1. A supervised token that is not among the
    entries of its position is skipped and counted, because the file does not hold its
    log-probability. Rows that cannot be used are written to rejects.jsonl with the reason.

    \b
    axolotl     input_ids, labels, target_token_ids, target_logprobs, target_mask
    distillkit  input_ids, and two columns of lists of lists: ids and log-probabilities, or these
                packed (compressed_logprobs, bytepacked_indices)
    megatron    input_ids; the log-probabilities are in tars (--logits)

    \b
    qpipe import logprobs.parquet --format distillkit --model Qwen/Qwen3-8B --out scores/
    """
    from ..exchange.import_scores import import_scores
    from .folder_summary import print_scores

    print_scores(options["out"], import_scores(ImportSettings(**options)))


@click.command("export", cls=Command)
@click.argument("scores", type=FOLDER)
@options_of(ExportSettings, out={"type": FILE})
@config_option
def export(**options: Any) -> None:
    """Export a score folder to a file for another tool.

    axolotl reads the file as a tokenized dataset for knowledge distillation. It divides by the
    mass of the top k itself unless `kd_normalize_topk` is off. The columns of veomni are the
    inputs of the top-k distillation loss of VeOmni and verl. megatron makes a folder of the tars
    that Megatron-LM reads.

    \b
    qpipe export scores/ --format axolotl --out logprobs.parquet
    """
    from ..exchange.export_scores import export_scores

    totals = export_scores(ExportSettings(**options)).totals
    click.echo(
        f"{options['out']}: {totals['rows']:,} demonstrations, {totals['positions']:,} supervised "
        "tokens"
    )
