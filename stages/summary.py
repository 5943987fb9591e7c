"""What the commands say when they are done, as a few aligned lines, and as JSON for machines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from ..pipeline.ceiling import Ceiling, ceiling_advice, ceilings, reproducible_share
from ..pipeline.executors import PartResult
from ..pipeline.manifest import Manifest
from ..pipeline.methods import table
from ..pipeline.progress import log_event
from ..pipeline.runner import REJECTS, StageResult, folder_in
from .lineage import described

if TYPE_CHECKING:
    from ..trainer.loop import TrainResult
    from .compare_methods import Comparison
    from .doctor import Diagnosis
    from .rescore import Rescored
    from .status import FolderStatus, TrainStatus


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def report(out: Path, in_store: bool, result: StageResult | PartResult, log: Path | None) -> None:
    """Say what a run did; append the same to a file of JSON lines, where one is asked for."""
    if isinstance(result, PartResult):
        print_part(result)
    else:
        identity = result.manifest.identity
        say = print_scores if identity.stage == "score" else print_targets
        say(folder_in(out, in_store, identity), result)
    _log_end(log, result)


def print_scores(folder: Path, result: StageResult) -> None:
    """What a score folder holds."""
    totals = result.manifest.totals
    rejected = f"{totals['rejected']:,} rejected"
    if totals["rejected"]:
        rejected += f" (see {folder / REJECTS})"
    print_table(
        [
            ("scores", f"{folder}{_already(result)}"),
            ("demonstrations", f"{totals['read']:,} read, {totals['rows']:,} scored, {rejected}"),
            ("", f"{totals['sums'].get('cut', 0):,.0f} of them cut to the limit"),
            ("supervised tokens", f"{totals['positions']:,}"),
            *_left_out(totals),
            ("kept mass", f"{kept_mass(result.manifest):.4f}"),
            ("mean loss", f"{totals['sums']['observed_nll'] / totals['positions']:.4f} nats"),
            *_size_and_speed(result),
        ]
    )


def _left_out(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tokens of an import whose log-probability was not in the file."""
    number = totals["sums"].get("left_out")
    return [("", f"{number:,.0f} left out: not among the entries")] if number else []


def print_rescored(result: "Rescored") -> None:
    """How far a folder's scores are from transformers in float32."""
    weights = {True: "", False: ", of other weights", None: ", of weights not compared"}
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
                f"{result.modes_changed:,} most probable tokens are others",
            ),
            ("KL", f"{result.kl_mean:.2g} nats on average, {result.kl_max:.2g} at most"),
        ]
    )


def print_targets(folder: Path, result: StageResult) -> None:
    """What a target folder holds, and what it can teach."""
    settings, totals = result.manifest.settings, result.manifest.totals
    has_tail = settings["top_p"] is not None
    print_table(
        [
            ("targets", f"{folder}{_already(result)}"),
            ("method", described(result.manifest.identity)),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("mean trust", f"{totals['sums']['trust'] / totals['positions']:.4f}"),
            ("mean support", f"{totals['entries'] / totals['positions']:.1f} entries"),
            *([("kept mass", f"{kept_mass(result.manifest):.4f}")] if has_tail else []),
            *_bounds(totals),
            *_size_and_speed(result),
        ]
    )
    print_ceiling(settings["form"], ceilings(totals["sums"]), totals)


def print_subset(folder: Path, result: StageResult) -> None:
    """What a subset holds."""
    totals = result.manifest.totals
    print_table(
        [
            ("subset", f"{folder}{_already(result)}"),
            ("demonstrations", f"{totals['rows']:,}"),
            ("supervised tokens", f"{totals['positions']:,}"),
            ("bytes a token", f"{bytes_per_token(result.manifest):.1f}"),
        ]
    )


def print_ceiling(form: str, rows: list[Ceiling], totals: Mapping[str, Any]) -> None:
    """What targets can teach at best, by the base's probability of the token."""
    if not rows:
        return
    at = " (at the start, where the student is the base)" if form == "live" else ""
    click.echo(f"\nWhat these targets can teach at best{at}")
    head = ("b(y)", "tokens", "-log Q(y)", "Q's mode is y", "γ < 0.05", "KL from base")
    print_table([head, *(_ceiling_cells(row) for row in rows)])
    share = reproducible_share(totals["sums"], totals["rows"])
    click.echo(f"Demonstrations that greedy decoding of Q writes: {share:.1%}")
    advice = ceiling_advice(rows[0], share)
    if advice:
        click.echo(f"Warning: {advice}", err=True)


def print_comparison(comparison: "Comparison") -> None:
    """The ceiling of every method."""
    head = ("method", "form", "-log Q(y)", "Q's mode is y", "demos", "γ < 0.05", "KL from base")
    rows = [
        (
            choice.method.name,
            choice.form,
            f"{row.nll:.4f}",
            f"{row.learnable:.1%}",
            f"{share:.1%}",
            f"{row.starved:.1%}",
            f"{row.divergence:.4f}",
        )
        for choice, row, share in comparison.rows
    ]
    print_table([head, *rows])
    click.echo(
        f"\n{comparison.positions:,} supervised tokens of {comparison.examples:,} demonstrations. "
        "demos: how many greedy decoding of Q writes.\nA live form is shown as it starts, where "
        "the student is the base. Q(y) below 1e-10 counts as 1e-10."
    )
    for reason, names in comparison.left_out.items():
        click.echo(f"Left out, {reason}: {', '.join(names)}.")


def print_status(folder: Path, status: "FolderStatus | TrainStatus") -> None:
    """How far a folder is."""
    from .status import FolderStatus

    work = {True: "being worked in", False: "nobody works in it", None: "not finished"}
    state = "done" if status.is_done else work[status.is_worked_in]
    rows = [(status.stage, f"{folder}  ({state})")]
    rows += _shard_rows(status) if isinstance(status, FolderStatus) else _step_rows(status)
    print_table(rows)


def _shard_rows(status: "FolderStatus") -> list[tuple[str, str]]:
    rows = [
        ("shards", _of(status.shards, status.shards_in_all)),
        ("demonstrations", _of(status.demonstrations, status.demonstrations_in_all)),
        ("rejected", f"{status.rejected:,}"),
        ("supervised tokens", f"{status.positions:,} of {status.tokens:,} tokens"),
        ("bytes", f"{status.bytes:,}"),
    ]
    if status.positions_per_second is not None:
        rows.append(("speed", f"{status.positions_per_second:,.0f} supervised tokens/s"))
    if status.seconds_since_shard is not None:
        rows.append(("last shard", f"{_time(status.seconds_since_shard)} ago"))
    if status.seconds_left is not None:
        rows.append(("time left", f"about {_time(status.seconds_left)}"))
    return rows


def _step_rows(status: "TrainStatus") -> list[tuple[str, str]]:
    if status.step is None:
        return [("steps", "none yet")]
    rows = [
        ("step", f"{status.step:,}"),
        ("loss", "-" if status.loss is None else f"{status.loss:.4f}"),
    ]
    if status.tokens_per_second is not None:
        rows.append(("speed", f"{status.tokens_per_second:,.0f} supervised tokens/s"))
    if status.seconds_since_step is not None:
        rows.append(("last step", f"{_time(status.seconds_since_step)} ago"))
    return rows


def _of(count: int, total: int | None) -> str:
    return f"{count:,}" if not total else f"{count:,} of {total:,} ({count / total:.1%})"


def _time(seconds: float) -> str:
    return tqdm.format_interval(seconds)


def print_methods() -> None:
    """The table of methods, a few lines each."""
    for row in table():
        residual, scale = row["residual"], row["scale"]
        click.echo(f"{row['name']}  ({row['source']})")
        target = f"γ = {row['trust']}" + (f"   π̃ {residual}" if residual != "-" else "")
        click.echo(f"    {target}" + (f"   s = {scale}" if scale != "1" else ""))
        for name in ("parameters", "forms", "needs"):
            if row[name] != "-":
                click.echo(f"    {name}: {row[name]}")


def print_diagnosis(found: "Diagnosis") -> None:
    """What `qpipe doctor` found."""
    print_table(
        [
            ("qpipe", found.qpipe),
            ("python", f"{found.python}, {found.system}"),
            ("machine", f"{found.cores} cores, {found.memory_gib:g} GiB"),
            *(
                (f"gpu {index}", f"{device.name}, {device.memory_gib:g} GiB")
                for index, device in enumerate(found.devices)
            ),
            *([("gpu", f"none: {found.problem}")] if found.problem else []),
            *((name, number or "-") for name, number in found.packages.items()),
        ]
    )
    click.echo("\nWith their default options")
    print_table([(name, use) for name, use in found.uses.items()])
    if not found.missing:
        click.echo("\nNothing is missing.")
        return
    click.echo("\nNot installed, and what needs it")
    print_table([(each["package"], each["needed_for"], each["install"]) for each in found.missing])


def _ceiling_cells(row: Ceiling) -> tuple[str, ...]:
    if not row.positions:
        return (row.name, "0", "", "", "", "")
    return (
        row.name,
        f"{row.positions:,}",
        f"{row.nll:.4f}",
        f"{row.learnable:.1%}",
        f"{row.starved:.1%}",
        f"{row.divergence:.4f}",
    )


def _bounds(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How far off a temperature's distribution may be."""
    return [
        (f"{name} bound", f"{totals['sums'][key] / totals['positions']:.2g} (total variation)")
        for name, key in (
            ("temperature", "temperature_bound"),
            ("teacher's", "teacher_temperature_bound"),
        )
        if key in totals["sums"]
    ]


def print_training(folder: Path, result: "TrainResult") -> None:
    """How a training run went."""
    already = "  (was there already, nothing to do)" if result.was_done else ""
    speed = result.tokens / max(result.seconds, 1e-9)
    rows = [
        ("model", f"{folder}{already}"),
        ("steps", f"{result.steps:,} over {result.examples:,} demonstrations"),
        ("supervised tokens", f"{result.tokens:,}"),
        ("speed", f"{speed:,.0f} supervised tokens/s"),
    ]
    for when, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation is not None:
            words = f"target loss {evaluation.target_loss:.4f}, NLL {evaluation.nll:.4f}"
            if evaluation.kl_to_base is not None:
                words += f", KL to base {evaluation.kl_to_base:z.4f}"
            words += f", entropy {evaluation.entropy:.4f}"
            rows.append((f"held out, {when}", words))
    print_table(rows)


def kept_mass(manifest: Manifest) -> float:
    """The mean probability that the stored entries hold."""
    return 1 - manifest.totals["sums"]["tail_mass"] / manifest.totals["positions"]


def bytes_per_token(manifest: Manifest) -> float:
    """Bytes of the shards for each supervised token."""
    return manifest.totals["bytes"] / manifest.totals["positions"]


def print_part(result: PartResult) -> None:
    """What one of several tasks did for a folder that is not finished."""
    rows = [
        ("folder", f"{result.folder}  (not finished: the last task to finish seals it)"),
        ("this task", f"{result.share}: {result.made:,} shards made"),
        ("shards", f"{result.there:,} of {result.shards:,} are there"),
    ]
    if result.seconds:
        speed = result.positions / result.seconds
        rows.append(("speed", f"{speed:,.0f} supervised tokens/s"))
    print_table(rows)


def _log_end(log: Path | None, result: StageResult | PartResult) -> None:
    own = {"positions": result.positions, "seconds": result.seconds}
    if isinstance(result, PartResult):
        counts = {"made": result.made, "there": result.there, "shards": result.shards}
        share = {"rank": result.share.rank, "world_size": result.share.world_size}
        log_event(log, "part", **own, **counts, **share)
        return
    manifest = result.manifest
    named = {"stage": manifest.identity.stage, "fingerprint": manifest.fingerprint}
    log_event(log, "done", **named, **own, totals=manifest.totals)


def _already(result: StageResult) -> str:
    return "" if not result.was_done else "  (was there already, nothing to do)"


def _size_and_speed(result: StageResult) -> list[tuple[str, str]]:
    rows = [("bytes a token", f"{bytes_per_token(result.manifest):.1f}")]
    if result.seconds:
        rows.append(("speed", f"{result.positions / result.seconds:,.0f} supervised tokens/s"))
    return rows
