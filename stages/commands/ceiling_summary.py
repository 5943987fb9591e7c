"""Prints the best result that targets allow: of one folder, and of every method."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ...pipeline.methods.table import METHODS
from ...pipeline.targets.ceiling import Ceiling, ceiling_advice, reproducible_share
from ...pipeline.targets.translation import Mapped, mapped_shares
from .tables import print_table

if TYPE_CHECKING:
    from ..build_targets.compare_methods import Comparison


def print_ceiling(
    settings: Mapping[str, Any], rows: list[Ceiling], totals: Mapping[str, Any]
) -> None:
    """Print the ceiling of a folder, by the base's probability of the observed token."""
    if not rows:
        return
    at = ""
    if METHODS[settings["method"]].divergence is not None:
        at = " (at the end, where the student is the teacher)"
    elif settings["form"] == "live":
        at = " (at the start, where the student is the base)"
    click.echo(f"\nWhat these targets can teach at best{at}")
    cells = [
        (row.name, f"{row.positions:,}", *(_cells(row) if row.positions else [""] * 4))
        for row in rows
    ]
    head = ("b(y)", "tokens", "-log Q(y)", "Q's mode is y", "γ < 0.05", "KL from base")
    print_table([head, *cells])
    share = reproducible_share(totals["sums"], totals["rows"])
    click.echo(f"Demonstrations that greedy decoding of Q writes: {share:.1%}")
    _print_mapped(mapped_shares(totals["sums"], totals["positions"]))
    advice = ceiling_advice(rows[0], share)
    if advice:
        click.echo(f"Warning: {advice}", err=True)


def mapped_rows(teachers: list[Mapped]) -> list[tuple[str, str]]:
    """Rows of a table for what was mapped of teachers with another tokenizer."""
    return [
        (
            f"{each.name} mapped",
            f"{each.positions:.1%} of the tokens, {each.mass:.1%} of their mass",
        )
        for each in teachers
    ] + [
        ("", f"{number:,} demonstrations {why}")
        for each in teachers
        for number, why in (
            (each.other_text, "have another supervised text in its folder"),
            (each.missing, "are not in its folder"),
        )
        if number
    ]


def _print_mapped(teachers: list[Mapped]) -> None:
    """Print what the ceiling takes from the base, as a teacher has another tokenizer."""
    for each in teachers:
        click.echo(
            f"The {each.name} has another tokenizer: {1 - each.positions:.1%} of the tokens have "
            f"the base in its place; at the others {1 - each.mass:.1%} of its mass is in the tail."
        )
        if each.is_little:
            click.echo(
                f"Warning: of the {each.name} only {each.positions:.0%} of the tokens and "
                f"{each.mass:.0%} of their mass could be mapped: take a teacher whose tokenizer "
                "and chat template are nearer to the base's",
                err=True,
            )


def _cells(row: Ceiling) -> list[str]:
    shares = (f"{row.learnable:.1%}", f"{row.starved:.1%}")
    return [f"{row.nll:.4f}", *shares, f"{row.divergence:z.4f}"]


def print_comparison(comparison: "Comparison") -> None:
    """Print the ceiling of every method, the best first, and the advice that follows."""
    from ..build_targets.compare_methods import advice, ranked

    head = ("method", "form", "-log Q(y)", "Q's mode is y", "demos", "γ < 0.05", "KL from base")
    rows = []
    for choice, row, share in ranked(comparison.rows):
        nll, learnable, *others = _cells(row)
        rows.append((choice.method.name, choice.form, nll, learnable, f"{share:.1%}", *others))
    print_table([head, *rows])
    click.echo(
        f"\n{comparison.positions:,} supervised tokens of {comparison.examples:,} demonstrations. "
        "demos: how many greedy decoding of Q writes.\nA live form is shown as it starts, where "
        "the student is the base; a divergence as it ends, where the student is the teacher.\nQ(y) "
        "below 1e-10 counts as 1e-10. The ids that are not stored count as one in the KL, which is "
        "then too low."
    )
    click.echo(f"Advice: {advice(comparison.rows)}.")
    _print_mapped(comparison.mapped)
    for reason, names in comparison.left_out.items():
        click.echo(f"Left out, {reason}: {', '.join(names)}.")
