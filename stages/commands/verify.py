"""The words of `qpipe verify`."""

from pathlib import Path

import click

from ..options import FOLDER, Command, config_option, log_option


@click.command(cls=Command)
@click.argument("folder", type=FOLDER)
@click.option(
    "--rescore",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Score N random examples of a score folder again, with transformers in float32.",
)
@click.option(
    "--model", default=None, help="That scored them, where the name in the manifest will not do."
)
@click.option("--revision", default=None, help="Branch, tag or commit of a model on the hub.")
@click.option("--seed", type=int, default=0, help="Of the choice of examples.")
@log_option
@config_option
@click.pass_context
def verify(
    ctx: click.Context,
    folder: Path,
    rescore: int | None,
    model: str | None,
    revision: str | None,
    seed: int,
    log_json: Path | None,
) -> None:
    """Tell what a folder's numbers are worth.

    With --rescore, random examples are scored again by the same weights with transformers in
    float32, and the largest differences are printed: what bfloat16 or a quantised engine costs.

    \b
    qpipe verify scores/ --rescore 32
    """
    from .. import summary
    from ..rescore import rescore as score_again

    if rescore is None:
        raise click.UsageError("Missing option '--rescore'.", ctx)
    result = score_again(folder, model, revision, rescore, seed)
    summary.print_rescored(result)
    if log_json:
        summary.log_event(log_json, summary.rescored_event(folder, result))
