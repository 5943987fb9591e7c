"""`python -m qpipe.stages`: the command line, for launchers that start a module (torchrun)."""

from .cli import main

main()
