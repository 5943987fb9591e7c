"""`qpipe verify`: options, call, output."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import FOLDER, Command, config_option, log_json_option
from .tables import print_table

if TYPE_CHECKING:
    from ..folders.rescore import Rescored

_MOST_SHOWN = 20


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option(
    "--rescore",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Also score N random examples of a score folder again, with transformers in float32.",
)
@click.option(
    "--model",
    default=None,
    help="Reference model for --rescore. Defaults to the model named in the manifest, "
    "if it is on this machine; may be another with the same tokenizer, for example the "
    "unquantized original.",
)
@click.option("--revision", default=None, help="Branch, tag or commit of a model on the Hub.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed for the choice of examples.")
@log_json_option("Append what --rescore finds to this file, as one JSON line.")
@config_option
def verify(
    folder: Path,
    rescore: int | None,
    model: str | None,
    revision: str | None,
    seed: int,
    log_json: Path | None,
) -> None:
    """Verify every byte of a score or target folder, or of a trained model.

    Compares the hash of every file with the manifest, reads every row, and checks columns,
    counts, ids, probabilities, masses and positions, and the fingerprints back to the
    demonstrations. Prints shard, row and column of each problem; the exit status is 2 if there
    are any. Of a model that qpipe trained, compares the hash of every file.

    With --rescore, scores random examples again with transformers in float32 and prints the
    largest differences and the KL divergence, which show the cost of bfloat16 or of a quantized
    engine.

    \b
    qpipe verify targets/
    qpipe verify run/
    qpipe verify scores/ --rescore 32
    """
    for option, value in (("--model", model), ("--revision", revision)):
        if value is not None and rescore is None:
            raise click.UsageError(f"{option} {value}: requires --rescore N: give both")
    from ...pipeline.folders.manifest import read_manifest
    from ...trainer.run.folder import RUN
    from ..folders.verify import verify, verify_run

    if (folder / RUN).exists():
        if rescore is not None:
            raise click.UsageError(f"--rescore {rescore}: {folder} is a model: give a score folder")
        _check(folder, verify_run(folder))
        click.echo(f"{folder}: all well: every file of the model is as {RUN} states")
        return
    _check(folder, verify(folder))
    manifest = read_manifest(folder)
    totals = manifest.totals
    click.echo(
        f"{folder}: all well: {totals['rows']:,} demonstrations, {totals['positions']:,} "
        f"supervised tokens, {len(manifest.shards):,} shard(s)"
    )
    if manifest.identity.stage == "score":
        _note_ties(folder)
    if rescore is not None:
        from ...pipeline.progress import log_event
        from ..folders.rescore import rescore as score_again

        result = score_again(folder, model, revision, rescore, seed)
        print_rescored(result)
        log_event(log_json, "rescore", **asdict(result))


def _note_ties(folder: Path) -> None:
    """Print a note on a folder whose log-probabilities were rounded."""
    from ...pipeline.folders.sealed import open_sealed
    from ..folders.rescore import MANY_TIES, tied_share

    share = tied_share(open_sealed(folder, "score"))
    if share > MANY_TIES:
        click.echo(
            f"note: {share:.0%} of neighbouring entries have equal log-probabilities: the logits "
            "were rounded, as bfloat16 does, so that ranks and the order of entries are arbitrary "
            "among them: score with vLLM 0.26 or later, which computes logits in float32, or with "
            "--dtype float32"
        )


def _check(folder: Path, problems: Iterable[str]) -> None:
    """Print the problems. Raises UserError if there are any."""
    from ...pipeline.errors import UserError, escaped_line

    found = 0
    for problem in problems:
        found += 1
        if found <= _MOST_SHOWN:
            click.echo(escaped_line(problem), err=True)
    if found:
        raise UserError(f"{folder}: {found} problem(s): restore it, or make it again")


def print_rescored(result: "Rescored") -> None:
    """Print the differences from transformers in float32."""
    weights = {True: "", False: ", other weights", None: ", weights not compared"}
    print_table(
        [
            (
                "scored again",
                f"{result.examples:,} demonstrations, {result.positions:,} supervised "
                f"tokens: {result.engine} in {result.dtype} against transformers in "
                f"float32{weights[result.same_weights]}",
            ),
            (
                "observed token",
                f"log-probability off by {result.observed:.2g} nats at most, "
                f"{result.observed_mean:.2g} on average",
            ),
            ("top k", f"log-probability off by {result.entries:.2g} nats at most"),
            (
                "rank",
                f"{result.ranks_changed:,} changed, by {result.rank:,} at most; "
                f"{result.modes_changed:,} most probable tokens differ",
            ),
            ("KL", f"{result.kl_mean:.2g} nats on average, {result.kl_max:.2g} at most"),
        ]
    )
