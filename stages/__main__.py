"""`python -m qpipe.stages`: the command line for launchers that start a module, as torchrun does."""

from .cli import main

main()
