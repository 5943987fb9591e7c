"""The table of methods."""

import click

from ...pipeline.methods.words import table


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
