"""Steps and micro-batches: nothing lost, nothing twice, and the same on any number of processes."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.steps import (
    Step,
    deal,
    micro_batch_cut,
    micro_batches,
    read_steps,
    steps_of_samples,
    steps_of_tokens,
)
from qpipe.trainer.data.stream import TargetStream, open_streams

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000), st.integers(1, 20))
def test_steps_of_samples(lengths: list[int], start: int, samples: int) -> None:
    steps = list(steps_of_samples(lengths, start, samples))
    check_joined(steps, lengths, start)
    assert all(len(step.lengths) == samples for step in steps[:-1])
    assert 0 < len(steps[-1].lengths) <= samples


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000), st.integers(1, 200))
def test_steps_of_tokens(lengths: list[int], start: int, tokens: int) -> None:
    """None too large but for a single sample, none with room for the next one."""
    steps = list(steps_of_tokens(lengths, start, tokens))
    check_joined(steps, lengths, start)
    assert all(sum(step.lengths) <= tokens or len(step.lengths) == 1 for step in steps)
    assert all(sum(one.lengths) + after.lengths[0] > tokens for one, after in pairwise(steps))


def check_joined(steps: list[Step], lengths: list[int], start: int) -> None:
    assert list(chain(*(step.lengths for step in steps))) == lengths
    assert steps[0].start == start
    assert all(one.stop == after.start for one, after in pairwise(steps))


def test_steps_are_lazy() -> None:
    """As they must be over a sequence that has no end."""
    endless = iter(lambda: 3, None)
    assert [step.start for step in islice(steps_of_tokens(endless, 5, 10), 3)] == [5, 8, 11]
    assert next(steps_of_samples(iter(lambda: 3, None), 0, 2)) == Step(0, (3, 3))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 200), st.booleans())
def test_a_plan_has_each_sample_once(
    lengths: list[int], world_size: int, batch_tokens: int, packed: bool
) -> None:
    step = Step(100, tuple(lengths))
    plans = [micro_batches(step, r, world_size, batch_tokens, packed) for r in range(world_size)]
    numbers = [number for plan in plans for batch in plan for number in batch]
    assert sorted(numbers) == list(range(100, step.stop))
    assert len({len(plan) for plan in plans}) == 1
    # not for nothing: some rank needs them all
    assert any(all(plan) for plan in plans)
    for batch in chain(*plans):
        sizes = [lengths[number - 100] for number in batch]
        tokens = sum(sizes) if packed else len(sizes) * max(sizes, default=0)
        assert tokens <= batch_tokens or len(batch) == 1


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_ranks_are_balanced(lengths: list[int], world_size: int) -> None:
    """The last sample of the fullest rank went to the emptiest one, and is its shortest."""
    shares = deal(Step(0, tuple(lengths)), world_size)
    sizes = [[lengths[number] for number in share] for share in shares]
    assert all(share == sorted(share, reverse=True) for share in sizes)
    fullest = max(sizes, key=sum)
    assert sum(fullest) - fullest[-1] <= min(map(sum, sizes))


def test_dealing_and_cutting_by_hand() -> None:
    step = Step(10, (5, 9, 5, 7, 2))
    # 9 to rank 0, 7 to rank 1, 5 to 1 (7 < 9), 5 to 0 (9 < 12), 2 to 1 (12 < 14)
    assert deal(step, 2) == [[11, 12], [13, 10, 14]]
    assert micro_batch_cut(step, [13, 10, 14], 14, packed=False) == [[13, 10], [14]]
    assert micro_batch_cut(step, [13, 10, 14], 14, packed=True) == [[13, 10, 14]]
    assert micro_batch_cut(step, [13, 10, 14], 21, packed=False) == [[13, 10, 14]]
    assert micro_batch_cut(step, [13, 10, 14], 6, packed=True) == [[13], [10], [14]]
    assert micro_batches(step, 0, 2, 13, packed=False) == [[11], [12]]
    assert micro_batches(step, 1, 2, 13, packed=False) == [[13], [10, 14]]


def test_a_rank_without_samples_has_empty_batches() -> None:
    step = Step(0, (4, 4, 4))
    assert micro_batches(step, 3, 4, 4, packed=False) == [[]]
    assert micro_batches(Step(0, (8, 4, 4)), 0, 2, 4, packed=True) == [[0], []]


@pytest.fixture
def stream(
    make_targets: Callable[..., Path], make_examples: Callable[..., list[TargetExample]]
) -> TargetStream:
    """110 examples in 22 record batches: two windows."""
    folder = make_targets(make_examples(110))
    return open_streams(open_sealed(folder), 0.0)[0]


def steps(stream: TargetStream, start: int, stop: int) -> Iterator[Step]:
    return steps_of_tokens(stream.lengths(0, range(start, stop)), start, 90)


def taken(
    stream: TargetStream, start: int, count: int, world_size: int, packed: bool
) -> tuple[list[Counter[str]], int]:
    """The ids of each of the next steps, over all ranks, and where the sequence then stands."""
    cut_to_count = list(islice(steps(stream, start, 330), count))
    ids: list[Counter[str]] = [Counter() for _ in cut_to_count]
    for rank in range(world_size):
        plans = (micro_batches(step, rank, world_size, 24, packed) for step in cut_to_count)
        for own, batches in zip(ids, read_steps(stream, 0, plans), strict=True):
            own.update(example.id for batch in batches for example in batch)
    return ids, cut_to_count[-1].stop


@pytest.mark.parametrize("worlds", [(1, 1, 1), (1, 2, 1), (3, 1, 8), (2, 5, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_world_sizes_may_change_at_any_step(
    stream: TargetStream, worlds: tuple[int, ...], packed: bool
) -> None:
    """Three epochs, stopped twice and continued elsewhere: the steps are those of one process."""
    expected, stop = taken(stream, 0, 1000, 1, packed)
    assert stop == 330
    assert sum(expected, Counter()) == {f"example-{index}": 3 for index in range(110)}
    found, place = taken(stream, 0, 5, worlds[0], packed)
    assert 0 < place < 110
    more, place = taken(stream, place, 7, worlds[1], packed)
    last, place = taken(stream, place, 1000, worlds[2], packed)
    assert place == 330
    assert found + more + last == expected


def test_examples_stand_where_the_plan_puts_them(stream: TargetStream) -> None:
    """Also those of an empty batch, and of a step that lies across two windows and epochs."""
    whole = list(stream.samples(0, range(230)))
    plans = [[[3, 1], [2]], [[]], [[200, 9, 100], [], [77]], [[229]]]
    read = list(read_steps(stream, 0, plans))
    assert [[[e.id for e in batch] for batch in step] for step in read] == [
        [[whole[number].id for number in batch] for batch in plan] for plan in plans
    ]
