"""What `qpipe doctor` found."""

from typing import TYPE_CHECKING

import click

from .tables import print_table

if TYPE_CHECKING:
    from .diagnosis import Diagnosis


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
