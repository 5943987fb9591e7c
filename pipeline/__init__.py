"""Stored folders and targets: format, methods, folders. This floor does not import torch.

`read_scores(folder)` and `read_targets(folder)` yield the decoded examples of a sealed folder, one
shard in memory at a time; `decoder(folder)` decodes rows that another tool has read. Begin with
`format.records` (the examples), `methods.table` and `folders.manifest`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folders.sealed import decoder, read_scores, read_targets

__all__ = ["decoder", "read_scores", "read_targets"]


def __getattr__(name: str) -> Any:
    # importing pyarrow takes longer than `qpipe --help` may take
    if name in __all__:
        from .folders import sealed

        return getattr(sealed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
