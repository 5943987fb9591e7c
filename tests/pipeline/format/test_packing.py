"""Packed targets: what is read is what was stored, to the precision that was asked for."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.arrow import decode, encode
from qpipe.pipeline.format.batches import FlatBatch, split
from qpipe.pipeline.format.packing import (
    PRECISIONS,
    Packing,
    Precision,
    ids_of,
    pack,
    ranks_of,
    unpack,
)
from qpipe.pipeline.format.probability_codes import LEVELS
from qpipe.pipeline.format.schema import schema_of

Floats = NDArray[np.float64]
LARGEST_ERROR = {"uint8": 0.1501, "float16": 0.032, "float32": 1e-5}  # nats, down to e^-14
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def targets(supports: list[dict[int, float]], tails: list[float]) -> dict[str, NDArray[Any]]:
    """The columns of supports given as id → probability."""
    return {
        "counts": np.array([len(each) for each in supports], np.int32),
        "support_ids": np.array([token for each in supports for token in each], np.int32),
        "support_probs": np.array([p for each in supports for p in each.values()], np.float32),
        "tail_mass": np.array(tails, np.float32),
    }


def wrong(level: str, place: int, what: str) -> UserError:
    return UserError(f"{level} {place}: {what}")


def through(
    arrays: dict[str, NDArray[Any]], packing: Packing
) -> tuple[list[dict[int, float]], NDArray[np.float32]]:
    """Supports and tails packed and unpacked again."""
    stored = pack(arrays, packing) | {"counts": arrays["counts"]}
    read = unpack(stored, packing, wrong)
    ends = np.cumsum(read["counts"])
    starts = ends - read["counts"]
    supports = [
        dict(
            zip(
                read["support_ids"][start:end].tolist(),
                read["support_probs"][start:end].tolist(),
                strict=True,
            )
        )
        for start, end in zip(starts, ends, strict=True)
    ]
    assert all(len(each) == n for each, n in zip(supports, read["counts"], strict=True))
    return supports, read["tail_mass"]


_logs = st.floats(-80, 0) | st.sampled_from([-0.0, -1e-7, -14.0, -103.0])
_supports = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 299), _logs, min_size=1, max_size=40),
        st.none() | _logs,
    ),
    min_size=1,
    max_size=5,
)


@every_precision
@settings(max_examples=150, deadline=None)
@given(drawn=_supports, frequent=st.lists(st.integers(0, 299), unique=True, max_size=30))
def test_any_distribution_comes_back_and_adds_up_to_one(
    precision: Precision, drawn: list[tuple[dict[int, float], float | None]], frequent: list[int]
) -> None:
    supports, tails = [], []
    for logs, log_tail in drawn:
        weights = {token: float(np.exp(each)) for token, each in logs.items()}
        tail = 0.0 if log_tail is None else float(np.exp(log_tail))
        total = sum(weights.values()) + tail
        if total < 1e-30:  # less than float32 can scale up
            weights, total = dict.fromkeys(weights, 1.0), len(weights) + tail
        supports.append({token: weight / total for token, weight in weights.items()})
        tails.append(tail / total)
    arrays = targets(supports, tails)

    read, read_tails = through(arrays, Packing(precision, 300, 40, tuple(frequent)))

    for wanted, found, tail, read_tail in zip(supports, read, tails, read_tails, strict=True):
        assert found.keys() == wanted.keys()
        assert sum(found.values()) + read_tail == pytest.approx(1, abs=1e-6)
        for token, prob in wanted.items():
            _is_near(prob, found[token], precision)
        _is_near(tail, read_tail, precision)


def _is_near(wanted: float, found: float, precision: Precision) -> None:
    wanted = float(np.float32(wanted))
    assert (found == 0) == (wanted == 0)
    if wanted > 1e-6:
        # scaling to 1 moves a whole position by less than its largest entry was rounded by
        error = 2 * LARGEST_ERROR[precision]
        assert abs(np.log(found / wanted)) <= error


def test_levels_descend_and_no_log_probability_is_far_from_one() -> None:
    assert LEVELS[0] == 0
    assert LEVELS[254] == pytest.approx(-88)
    assert LEVELS[255] == -np.inf
    steps = -np.diff(LEVELS[:255])
    assert (steps > 0).all()
    assert steps[LEVELS[1:255] > -14].max() == pytest.approx(0.3, rel=1e-9)
    assert steps[LEVELS[1:255] > -24].max() < 1.25
    assert steps.max() < 7.2
    # in even units of the square root where that is the finer of the two
    np.testing.assert_allclose(-np.diff(np.exp(LEVELS[:100] / 2)), 1 / 220, rtol=1e-12)


def test_codes_have_their_levels() -> None:
    """Worked out: (1 − code/220)² down to code 213, e^−14 at 236.69, e^−24 at 245."""
    stored = pack(targets([{0: 1.0, 1: 1.0, 2: 1.0}], [1.0]), Packing("uint8", 3, 3))
    codes = np.array([0, 110, 165], np.uint8)
    stored |= {"counts": np.array([3]), "support_log_probs": codes, "tail_log_probs": codes[1:2]}
    read = unpack(stored, Packing("uint8", 3, 3), wrong)
    weights = np.array([1, 1 / 4, 1 / 16])
    np.testing.assert_allclose(read["support_probs"], weights / (weights.sum() + 1 / 4), rtol=1e-6)
    assert LEVELS[236] > -14 > LEVELS[237]
    assert LEVELS[245] == pytest.approx(-24)


def test_the_nearest_level_is_stored() -> None:
    probs = np.exp(np.random.default_rng(0).uniform(-86, 0, 20_000)).astype(np.float32)
    arrays = {
        "counts": np.ones(len(probs), np.int32),
        "support_ids": np.zeros(len(probs), np.int32),
        "support_probs": probs,
        "tail_mass": 1 - probs,
    }
    codes = pack(arrays, Packing("uint8", 1, 1))["support_log_probs"]
    distance = np.abs(np.log(probs.astype(np.float64)) - LEVELS[codes])
    for shift in (-1, 1):
        beside = LEVELS[np.clip(codes.astype(int) + shift, 0, 254)]
        nearest = np.abs(np.log(probs.astype(np.float64)) - beside)
        assert (distance <= nearest + 1e-6).all()


@every_precision
def test_the_divergence_of_long_tailed_supports_is_small(precision: Precision) -> None:
    rng = np.random.default_rng(1)
    entries, positions = 30, 2000
    logs = -1.2 * np.log(np.arange(1, entries + 2)) + rng.normal(0, 0.7, (positions, entries + 1))
    logs[:, 0] += rng.uniform(0, 6, positions)
    probs = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
    supports = [dict(enumerate(row[:-1])) for row in probs]

    read, tails = through(targets(supports, list(probs[:, -1])), Packing(precision, 30, 30))

    found = np.array([[row[i] for i in range(entries)] for row in read])
    found = np.column_stack([found, tails])
    found /= found.sum(1, keepdims=True)  # float32 leaves them some 1e-7 off
    divergence = (probs * np.log(probs / found)).sum(1)
    assert divergence.mean() < {"uint8": 1e-4, "float16": 1e-6, "float32": 1e-12}[precision]
    assert divergence.max() < {"uint8": 1e-3, "float16": 1e-5, "float32": 1e-11}[precision]


@pytest.mark.parametrize("vocab_size", [1, 7, 300, 2**20, 2**20 + 1, 2**31 - 1])
def test_ranks_and_ids_are_each_others_inverse(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    listed = np.unique(rng.integers(0, vocab_size, 50))
    packing = Packing("uint8", vocab_size, 4, tuple(rng.permutation(listed).tolist()))
    probe = np.unique(
        np.concatenate(
            [listed, listed + 1, listed - 1, [0, vocab_size - 1], rng.integers(0, vocab_size, 99)]
        )
    )
    ids = probe[(probe >= 0) & (probe < vocab_size)]

    ranks = ranks_of(ids, packing)

    assert ranks_of(np.array(packing.frequent_ids), packing).tolist() == list(range(len(listed)))
    assert ids_of(ranks, packing).tolist() == ids.tolist()
    assert len(np.unique(ranks)) == len(ids)
    assert ranks.min() >= 0
    assert ranks.max() < vocab_size
    others = ranks[~np.isin(ids, listed)]
    assert (np.diff(others) > 0).all()  # those not listed keep their order
    if vocab_size <= 300:
        assert sorted(ranks_of(np.arange(vocab_size), packing)) == list(range(vocab_size))


@pytest.mark.parametrize("vocab_size", [200, 49_152, 151_936, 2**31 - 1])
def test_ids_take_the_narrowest_types_and_come_back(vocab_size: int) -> None:
    high = {200: pa.uint8(), 49_152: pa.uint8(), 151_936: pa.uint16()}.get(vocab_size, pa.int32())
    packing = Packing("uint8", vocab_size, 65, (3, vocab_size - 1, 0))
    schema = schema_of("build-targets", vocab_size, packing)
    assert schema.arrow.field("rank_steps_low").type == pa.list_(pa.uint8())
    assert schema.arrow.field("rank_steps_high").type == pa.list_(high)
    assert schema.arrow.field("counts").type == pa.list_(pa.uint8())
    wanted = [[0, 1, 2], [vocab_size - 1], [vocab_size - 2, 3, vocab_size - 1, 100]]
    arrays = targets([dict.fromkeys(ids, 1 / len(ids)) for ids in wanted], [0.0] * 3)

    read, _ = through(arrays, packing)

    assert [sorted(each) for each in read] == [sorted(ids) for ids in wanted]


def batch() -> FlatBatch:
    arrays = targets([{5: 0.5, 2: 0.25}, {0: 1.0}, {7: 0.1, 8: 0.2, 9: 0.3}], [0.25, 0.0, 0.4])
    more = {
        "input_ids": np.array([1, 5, 0, 1, 9], np.int32),
        "positions": np.array([1, 2, 1], np.int32),
        "trust": np.array([0.5, 1.0, 0.0], np.float32),
        "weights": np.array([1.0, 2.0, 0.1], np.float32),
    }
    lengths = {"token": [3, 2], "position": [2, 1], "entry": [3, 3]}
    return FlatBatch(
        ["one", "two"], arrays | more, {name: np.array(each) for name, each in lengths.items()}
    )


@every_precision
def test_a_batch_survives_a_shard_and_its_rows_stand_alone(precision: Precision) -> None:
    schema = schema_of("build-targets", 10, Packing(precision, 10, 3, (7, 5)))
    stored = encode(schema, batch())
    stored.validate(full=True)

    both = decode(schema, stored, "here")
    second = decode(schema, stored.take(pa.array([1])), "here")

    for name in ("input_ids", "positions", "trust", "weights", "counts"):
        np.testing.assert_array_equal(both[name], batch()[name])
    one, two = split(schema, both)
    (alone,) = split(schema, second)
    for name in ("support_ids", "support_probs", "tail_mass"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(two, name))
    assert one.support_ids.tolist() == [5, 2, 0]  # 7, 5, then the others
    assert one.tail_mass == pytest.approx([0.25, 0], rel=0.02)
    assert one.tail_mass[1] == 0


def test_ids_outside_of_the_vocabulary_are_never_stored() -> None:
    wrong = replace(batch())
    wrong.arrays["support_ids"][-1] = 10
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        encode(schema_of("build-targets", 10, Packing("uint8", 10, 3)), wrong)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("rank_steps_high", 3, "rank_steps_high leads outside the vocabulary"),
        ("rank_steps_low", 200, "rank_steps_high leads outside the vocabulary"),
        ("support_log_probs", np.nan, "support_log_probs is not a distribution"),
        ("support_log_probs", np.inf, "support_log_probs is not a distribution"),
        ("support_log_probs", -np.inf, "support_log_probs is not a distribution"),
        ("tail_log_probs", np.nan, "support_log_probs is not a distribution"),
    ],
)
def test_what_nobody_packed_is_refused(column: str, value: float, said: str) -> None:
    packing = Packing("float32", 100, 3)
    stored = pack(targets([{5: 0.5, 2: 0.25}, {0: 1.0}], [0.25, 0]), packing)
    stored["counts"] = np.array([2, 1], np.int32)
    stored[column] = stored[column].copy()
    stored[column][:] = value

    with pytest.raises(UserError, match=f"^(position|entry) [01]: {said}"):
        unpack(stored, packing, wrong)
