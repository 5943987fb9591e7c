"""qpipe: offline soft targets for supervised fine-tuning.

The repository's root is this package:

    demonstrations → score → scores/ → build-targets → targets/ → train → a fine-tuned model

    pipeline/  the stored folders, the methods, and the targets; does not import torch
    trainer/   data, loss, models, steps and runs of training
    stages/    the commands, demonstrations, encoding, engines, reports

Imports go stages → trainer → pipeline. docs/code.md is the map.
"""

__version__ = "0.2.0"
