"""qpipe: offline soft targets for supervised fine-tuning.

The repository's root is this package. The flow is one line:

    demonstrations → score → scores/ → build-targets → targets/ → train → a fine-tuned model

    pipeline/  records, schema, codec, shards, manifests, the stage runner, the table of methods
    trainer/   the stream, the collator, the sparse loss, the training loop
    stages/    the commands, the readers of demonstrations, chat templates, the scorers

Imports go stages → trainer → pipeline; pipeline knows neither torch nor an engine.
"""

__version__ = "0.1.0"
