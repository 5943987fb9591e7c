"""`python -m qpipe.stages`: the command line, for launchers that start a module (torchrun)."""

from .cli import main

if __name__ == "__main__":  # vLLM's processes import the module that started them
    main()
