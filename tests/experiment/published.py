"""The runs as they stand beside the page: one compressed file to check, to tabulate, to go on from.

JSON lines under zstd: first the settings and the chats on other subjects, then a record a run, with
every answer that was judged.
"""

import json
from pathlib import Path

from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage.json_files import read_json, write_json
from zstandard import ZstdCompressor, ZstdDecompressor

from .records import Records
from .work import Work


def publish(path: Path, work: Work, records: Records) -> None:
    """Write what is recorded so far."""
    head = {"settings": work.settings, "unlike": read_json(work.unlike)}
    lines = (json.dumps(each) + "\n" for each in (head, *records.by_key.values()))
    path.write_bytes(ZstdCompressor(level=19).compress("".join(lines).encode()))


def take_over(path: Path, work: Work) -> None:
    """Put published runs into an open work folder that has none of its own.

    Raises UserError where they are of another experiment.
    """
    if work.records.exists():
        return
    head, *lines = ZstdDecompressor().decompress(path.read_bytes()).decode().splitlines(True)
    told = json.loads(head)
    if told["settings"] != work.settings:
        raise UserError(f"{path}: holds another experiment: leave --published out")
    write_json(work.unlike, told["unlike"])
    work.records.write_text("".join(lines))
