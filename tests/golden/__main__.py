"""Pin the help texts and the targets as they are now, after a change that was meant.

    python -m qpipe.tests.golden --write

The diff of tests/golden/help and targets.json then belongs to the commit that makes the change.
"""

import argparse
import tempfile
from pathlib import Path

from .helps import write_golden as write_help
from .targets import write_golden as write_targets


def main() -> None:
    """Write both, or nothing without --write."""
    parser = argparse.ArgumentParser(prog="python -m qpipe.tests.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    write_help()
    with tempfile.TemporaryDirectory() as root:
        write_targets(Path(root))


if __name__ == "__main__":
    main()
