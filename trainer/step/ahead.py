"""Batches copied to the device while it computes an earlier step."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..data.batch import Batch

_Key = TypeVar("_Key")


def on_device(
    steps: Iterable[tuple[_Key, list[Batch]]], device: torch.device
) -> Iterator[tuple[_Key, list[Batch]]]:
    """The steps with their batches on the device; to be run on a thread of its own.

    The copies go through pinned memory and a stream of their own. This thread waits for them, the
    thread that trains does not. Their memory is free for later copies when the training thread
    drops a step's batches, which it does after it has waited for the device.
    """
    if device.type != "cuda":
        yield from steps
        return
    stream = torch.cuda.Stream(device)
    for key, batches in steps:
        with torch.cuda.stream(stream):
            copied = [batch.to(device, non_blocking=True) for batch in batches]
        stream.synchronize()
        yield key, copied


def without_waiting(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from pageable memory the host would wait for the device."""
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)
