"""The operators that torch dispatches while a block runs."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# they return views, or memory that nothing is written to
_WITHOUT_A_KERNEL = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
    "split",
    "t",
    "transpose",
    "unsqueeze",
    "view",
    "_unsafe_view",
}
READS = {"_local_scalar_dense", "nonzero", "_unique2", "equal", "is_nonzero"}


class Dispatched(TorchDispatchMode):
    """Notes the name of each operator that runs, and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name.removeprefix("aten::"))
        self.results.append(result)
        return result

    @property
    def kernels(self) -> list[str]:
        """The operators that compute: on a GPU, a launch each."""
        return [name for name in self.names if name not in _WITHOUT_A_KERNEL]

    @property
    def reads(self) -> list[str]:
        """The operators whose result the host needs: on a GPU, it waits for them."""
        return [name for name in self.names if name in READS]

    def tensors(self, dtype: torch.dtype, size: int) -> list[tuple[int, ...]]:
        """The shapes of results of a type with at least so many values."""
        found = [each for each in self.results if isinstance(each, torch.Tensor)]
        return [tuple(each.shape) for each in found if each.dtype == dtype and each.numel() >= size]
