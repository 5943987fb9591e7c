"""Prints tables, and the note for a folder that is complete already."""

from collections.abc import Sequence

import click

from ...pipeline.errors import escaped_line


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in aligned columns; what could control the terminal is escaped."""
    rows = [[escaped_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def already(was_done: bool) -> str:
    """A note for a folder that an earlier run has completed."""
    return "  (was there already, nothing to do)" if was_done else ""
