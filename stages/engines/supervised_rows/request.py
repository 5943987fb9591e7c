"""The rows that a request asks for, as they travel in vLLM's `SamplingParams.extra_args`.

Row i of a prompt predicts token i + 1. Arrays travel as bytes, which every transport of vLLM keeps.
N rows, w ids to score at each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEY = "qpipe"


@dataclass(frozen=True, slots=True, eq=False)
class RowRequest:
    """The rows of one prompt, and the ids to score at each in addition to its top k."""

    rows: NDArray[np.integer]  # [N] ascending
    observed: NDArray[np.integer]  # [N] tokens
    given: NDArray[np.integer]  # [N, w] ids, padded with -1
    top_k: int

    def packed(self) -> dict[str, Any]:
        """The `extra_args` of the request."""
        arrays = (self.rows, self.observed, self.given)
        rows, observed, given = (array.astype(np.int32).tobytes() for array in arrays)
        return {_KEY: {"rows": rows, "observed": observed, "given": given, "top_k": self.top_k}}


def unpacked(sampling: Any) -> RowRequest | None:
    """The rows that sampling parameters ask for; None if they come from elsewhere."""
    packed = (getattr(sampling, "extra_args", None) or {}).get(_KEY)
    if packed is None:
        return None
    rows, observed, given = (
        np.frombuffer(packed[name], np.int32) for name in ("rows", "observed", "given")
    )
    return RowRequest(rows, observed, given.reshape(len(rows), -1), packed["top_k"])
