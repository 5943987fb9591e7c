"""The share of each stream in a mixture, and that a mixture has no state."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.mixture import Mixture, mix, turns_of
from qpipe.trainer.data.shares import shares_of
from qpipe.trainer.data.stream import open_streams

SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@pytest.fixture
def mixture(
    make_targets: Callable[..., Path], make_examples: Callable[..., list[TargetExample]]
) -> Mixture:
    """Folders of 40 and 7 examples, their lengths apart, three to one."""
    folders = [
        make_targets([renamed(each, name) for each in make_examples(count, seed)], name)
        for name, count, seed in (("a", 40, 1), ("b", 7, 2))
    ]
    streams = [open_streams(open_sealed(folder), 0.0)[0] for folder in folders]
    return mix(streams, [0.75, 0.25])


def renamed(example: TargetExample, name: str) -> TargetExample:
    values = {field: getattr(example, field) for field in example.__dataclass_fields__}
    return TargetExample(**(values | {"id": f"{name}-{example.id}"}))


@settings(deadline=None)
@given(SHARES)
def test_every_count_is_within_one_of_its_exact_share(shares: list[int]) -> None:
    turns = turns_of(shares)
    assert Counter(turns.tolist()) == dict(enumerate(shares))
    for stream, share in enumerate(shares):
        given_so_far = np.cumsum(turns == stream)
        exact = [Fraction(share * (k + 1), sum(shares)) for k in range(len(turns))]
        assert all(abs(int(n) - e) < 1 for n, e in zip(given_so_far, exact, strict=True))


@settings(deadline=None)
@given(SHARES)
def test_a_long_period_is_spread_evenly(shares: list[int]) -> None:
    """Each stream gives its share, never off by more than half a sample and half the streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpipe.trainer.data.mixture.LONGEST_PERIOD", 0)
        turns = turns_of(shares)
    assert Counter(turns.tolist()) == dict(enumerate(shares))
    for stream, share in enumerate(shares):
        exact = share * np.arange(1, len(turns) + 1) / sum(shares)
        most = 0.5 + len(shares) / 2
        assert np.abs(np.cumsum(turns == stream) - exact).max() <= most


def test_by_their_sizes_each_example_comes_once_however_many_there_are(
    mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpipe.trainer.data.mixture.LONGEST_PERIOD", 46)  # they are 40 and 7
    ids = [example.id for example in mix(mixture.streams).samples(0, range(94))]
    names = [f"a-example-{i}" for i in range(40)] + [f"b-example-{i}" for i in range(7)]
    assert sorted(ids[:47]) == sorted(ids[47:]) == sorted(names)


def test_turns_by_hand() -> None:
    # the second is not for stream 0, whose exact share of two is one; at the third 0 and 2 claim
    # one sample for each share alike, and the first of them has it
    assert turns_of([2, 1, 1]).tolist() == [0, 1, 0, 2]
    # shares for each sample: 3 to 1, 3/2 to 1, 3/3 to 1; then stream 0 has its share of four
    assert turns_of([3, 1]).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([1, 1], (1, 1)),
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([6, 4], (3, 2)),
        ([1e-3, 1], (1, 1000)),
        ([5], (1,)),
    ],
)
def test_weights_as_they_are_written(weights: list[float], shares: tuple[int, ...]) -> None:
    assert shares_of(weights) == shares


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"weights .*: give each folder a weight above 0"):
        shares_of(weights)


def test_weights_too_fine() -> None:
    with pytest.raises(UserError, match="only repeat after 1,000,001 samples: give rounder"):
        shares_of([1, 1e-6])


def test_each_stream_goes_through_its_own_epochs(mixture: Mixture) -> None:
    """160 samples: three epochs of the 40, and of the 7 as many as there is room for."""
    ids = [example.id for example in mixture.samples(0, range(160))]
    of_a = [row_id for row_id in ids if row_id.startswith("a-")]
    of_b = [row_id for row_id in ids if row_id.startswith("b-")]
    assert Counter(of_a) == {f"a-example-{index}": 3 for index in range(40)}
    assert Counter(of_b[:35]) == {f"b-example-{index}": 5 for index in range(7)}
    assert of_a[:40] != of_a[40:80]
    assert all(
        row_id.startswith("b-") == (turn == 1) for row_id, turn in zip(ids, turns(), strict=True)
    )


def turns() -> list[int]:
    return turns_of([3, 1]).tolist() * 40


def test_streams_of_the_same_data_do_not_run_in_step(mixture: Mixture) -> None:
    twice = mix([mixture.streams[0]] * 2, [1, 1])
    ids = [example.id for example in twice.samples(0, range(80))]
    assert ids[::2] != ids[1::2]
    assert sorted(ids[::2]) == sorted(ids[1::2])


@pytest.mark.parametrize("start", [0, 1, 39, 77, 300])
def test_any_numbers_give_what_the_whole_sequence_has_there(mixture: Mixture, start: int) -> None:
    whole = list(mixture.samples(4, range(400)))
    assert list(mixture.lengths(4, range(400))) == [len(example.input_ids) for example in whole]
    for rank in range(3):
        numbers = range(start + rank, 400, 3)
        ids = [example.id for example in mixture.samples(4, numbers)]
        assert ids == [whole[number].id for number in numbers]


def test_an_epoch_is_as_many_samples_as_the_folders_have(mixture: Mixture) -> None:
    assert len(mixture) == 40 + 7
