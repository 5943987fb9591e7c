"""Files of other tools as score folders, for several tests of this room."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from qpipe.stages.exchange.import_scores import import_scores
from qpipe.stages.exchange.settings import ImportSettings
from qpipe.stages.folders.verify import verify

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def imported(path: Path, tiny_model: Path, format: str = "distillkit", **options: Any) -> Path:
    out = path.with_suffix("")
    import_scores(ImportSettings(path, format, str(tiny_model), out, **options))  # type: ignore
    assert list(verify(out)) == []
    return out


def rejects(folder: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (folder / "rejects.jsonl").open()]


def a_row(**changes: Any) -> dict[str, Any]:
    """Four tokens, the last two supervised; the entries of row r are those of token r + 1."""
    probs = [[0.5, 0.3], [0.6, 0.3], [0.25, 0.7]]
    return {
        "input_ids": [5, 6, 7, 8],
        "labels": [-100, -100, 7, 8],
        "top_ids": [[1, 2], [7, 3], [8, 4]],
        "top_logs": np.log(probs).tolist(),
    } | changes
