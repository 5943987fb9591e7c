"""The progress bar that all stages show."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(**options: Any) -> tqdm:
    """A tqdm bar on standard error; where that is a log and no terminal, a line every 10 s."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(mininterval=interval, dynamic_ncols=True, **options)
