"""Divides examples into groups with an equal beginning, and a group into padded batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ....pipeline.format.records import Example
from ..base import shared_beginning

BATCH_TOKENS = 4096  # padded tokens of a forward pass, at most, with those of a beginning
_ENOUGH_TOKENS = 1024  # enough for full throughput: a batch ends before much shorter examples
_SHORTER = 0.875  # of the longest of the batch
LEAST_SHARED = 64  # tokens of a beginning
GROUP_COST = 128  # tokens that a group must save: its batches are smaller, and one more is run
MOST_TOGETHER = 512  # examples of a group; the search takes so many steps for each example


@dataclass(frozen=True, slots=True)
class Group:
    """Examples, by their indices, whose first `shared` tokens are equal and not supervised."""

    places: list[int]
    shared: int = 0


def batches(lengths: Sequence[int], shared: int = 0) -> Iterator[list[int]]:
    """Yield the indices of examples of these lengths, batch by batch, longest first.

    Each also has `shared` tokens that are computed already.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch:
            longest, padded = lengths[batch[0]], lengths[batch[0]] * len(batch)
            is_full = padded + longest + shared * (len(batch) + 1) > BATCH_TOKENS
            is_enough = padded >= _ENOUGH_TOKENS and lengths[place] < _SHORTER * longest
            if is_full or is_enough:
                yield batch
                batch = []
        batch.append(place)
    if batch:
        yield batch


def groups(examples: Sequence[Example]) -> list[Group]:
    """The division that computes the fewest tokens; the last group shares nothing.

    In the order of their tokens, examples with an equal beginning are adjacent. The row that
    predicts the first supervised token is computed for each example.
    """
    usable_of = [int(example.positions[0]) - 1 for example in examples]
    alone = [place for place, usable in enumerate(usable_of) if usable < LEAST_SHARED]
    order = sorted(
        {*range(len(examples))} - {*alone}, key=lambda place: examples[place].input_ids.tobytes()
    )
    ids = [examples[place].input_ids for place in order]
    common = [shared_beginning(*pair) for pair in pairwise(ids)]
    starts = _best_starts([usable_of[place] for place in order], common)
    found, end = [], len(order)
    while end:
        start, shared = starts[end]
        if shared:
            found.append(Group(order[start:end], shared))
        else:
            alone += order[start:end]
        end = start
    return [*found, Group(sorted(alone))]


def _best_starts(usable: list[int], common: list[int]) -> list[tuple[int, int]]:
    """Where the last group of the first n examples starts, and what it shares, for each n.

    `common` has the tokens that neighbours share.
    """
    saved, starts = [0], [(0, 0)]
    for end in range(1, len(usable) + 1):
        best, at, shared = saved[end - 1], (end - 1, 0), usable[end - 1]
        for start in range(end - 2, max(end - MOST_TOGETHER, 0) - 1, -1):
            shared = min(shared, common[start], usable[start])
            if shared < LEAST_SHARED:
                break
            of_group = saved[start] + (end - start - 1) * shared - GROUP_COST
            if of_group > best:
                best, at = of_group, (start, shared)
        saved.append(best)
        starts.append(at)
    return starts
