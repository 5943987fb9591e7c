"""What `make experiment` runs: the paper's claim in small, on this machine's cores.

    python -m qpipe.tests.experiment MODEL [--quick] [--plan | --tables] [--work DIR] [--page FILE]
        [--published FILE]

Interrupted at any moment, the same command goes on. --plan tells what is left and how long that
would take; --tables writes the page of what is recorded so far, and beside it the runs themselves.
Neither runs a model. --published starts from runs that were written so, of this machine or another.
"""

import argparse
import os
import sys
from pathlib import Path

from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage.locks import locked

from .conduct import conduct
from .forecast import forecast
from .plan import FULL, LANES, QUICK
from .published import publish, take_over
from .records import Records
from .tables import page
from .work import Work

PAGE = Path("docs/experiment.md")


def main() -> None:
    """Read the options, then plan, run and write."""
    parser = argparse.ArgumentParser(prog="make experiment")
    parser.add_argument("model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--quick", action="store_true", help="very little of everything: does it run?"
    )
    parser.add_argument("--plan", action="store_true", help="only tell what is left to do")
    parser.add_argument("--tables", action="store_true", help="only write the page")
    parser.add_argument("--work", type=Path, help="folder to work in [.cache/experiment]")
    parser.add_argument("--page", type=Path, help=f"page to write [{PAGE}; in --work if --quick]")
    parser.add_argument("--published", type=Path, help="runs to start from, if there are none")
    options = parser.parse_args()
    folder = "experiment-quick" if options.quick else "experiment"
    work = Work(
        (options.work or Path(".cache") / folder).resolve(),
        options.model.resolve(),
        QUICK if options.quick else FULL,
    )
    if options.published or not options.plan:
        work.open()
    if options.published:
        take_over(options.published, work)
    records = Records(work.records)
    if not options.tables:
        print(forecast(work.size, records), flush=True)
    if not (options.tables or options.plan):
        share_of_cores = max(1, len(os.sched_getaffinity(0)) // LANES)
        os.environ["OMP_NUM_THREADS"] = str(share_of_cores)
        with locked(work.root):
            records.mend()
            conduct(work, records)
    if not options.plan:
        written = options.page or (work.root / "page.md" if options.quick else PAGE)
        written.write_text(page(records.by_key.values(), work.size, work.parts))
        if records.by_key:
            publish(written.with_suffix(".jsonl.zst"), work, records)
        print(written)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
