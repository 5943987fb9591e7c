"""Any distribution comes through scores, every method's targets and their packing as what it was.

V ids of a vocabulary, N positions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray
from qpipe.pipeline.format.arrow import decode, encode
from qpipe.pipeline.format.batches import FlatBatch, flatten
from qpipe.pipeline.format.packing import PRECISIONS, Packing, Precision
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.format.row_checks import violations
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import METHODS, choices, choose
from qpipe.pipeline.targets.build import Evidence, ScoreModel, Truncation, flat_targets, targets_of
from qpipe.pipeline.targets.ceiling import ceiling_sums
from qpipe.stages.engines.base import scored

from .inputs import Draw, fuzz, made_or_refused

LARGEST_V = 40
SMALLEST = float(np.finfo(np.float32).smallest_normal)
Floats = NDArray[np.float64]
levels = (
    st.floats(-30, 0)
    | st.sampled_from([0.0, -1e-7, -0.5, -14.0, -87.3, -88.0, -103.2, -104.0, -800.0, -np.inf])
    | st.floats(-2000, 0)
)


@st.composite
def log_probs(draw: Draw, V: int) -> Floats:
    """One distribution, [V]: one-hot, or of a few numbers again and again, alike or far apart."""
    some = draw(st.lists(levels, min_size=1, max_size=6))
    if draw(st.booleans()):
        logits = np.full(V, some[0] if len(some) > 1 else -np.inf)
        logits[draw(st.integers(0, V - 1))] = 0
    else:
        logits = np.resize(some, V)
    logits = np.where(np.isfinite(logits).any(), logits, 0)
    return logits - np.logaddexp.reduce(logits)


@st.composite
def scored_examples(draw: Draw, V: int, top_k: int, tokens: Sequence[int]) -> ScoredExample:
    """An example of these tokens as an engine scores it: in float32, the rest in the tail."""
    positions = np.arange(1, len(tokens), dtype=np.int32)
    logs_NV = np.array([draw(log_probs(V)) for _ in positions]).reshape(-1, V)
    order_NV = np.argsort(-logs_NV, axis=1, kind="stable")
    observed_N = logs_NV[np.arange(len(positions)), np.array(tokens)[positions]]
    assume(np.isfinite(observed_N).all())  # an engine that says -inf of a token is refused
    example = scored(
        _example(tokens, positions),
        observed_N.astype(np.float32),
        (logs_NV >= observed_N[:, None]).sum(axis=1),
        order_NV[:, :top_k],
        np.take_along_axis(logs_NV, order_NV, axis=1)[:, :top_k].astype(np.float32),
        V,
    )
    weights = st.floats(0, 1, width=32) | st.sampled_from([1e-45, 1e30])
    example.token_weights[:] = [draw(weights) for _ in positions]
    return example


def _example(tokens: Sequence[int], positions: NDArray[np.int32]) -> Any:
    from qpipe.tests.support.examples import unweighted

    return unweighted("a", np.array(tokens, np.int32), positions)


@st.composite
def score_batches(draw: Draw) -> tuple[FlatBatch, FlatBatch, ScoreModel]:
    """Scores of a base and of a teacher of the same examples."""
    V = draw(st.integers(2, LARGEST_V))
    top_k = draw(st.integers(1, V))
    token = st.integers(0, V - 1)
    texts = draw(st.lists(st.lists(token, min_size=2, max_size=5), min_size=1, max_size=2))
    schema = schema_of("score", V)
    batches = [
        flatten(schema, [draw(scored_examples(V, top_k, tokens)) for tokens in texts])
        for _ in range(2)
    ]
    return batches[0], batches[1], ScoreModel(top_k, V, draw(temperatures))


temperatures = st.sampled_from([1.0, 1.0, 0.05, 0.5, 2.0, 20.0])


def problems(stage: str, batch: FlatBatch, V: int) -> list[str]:
    return [f"{each.column} {each.what}" for each in violations(stage, batch, V)]


def through_a_shard(stage: str, batch: FlatBatch, V: int, packing: Packing | None) -> FlatBatch:
    """A batch as it is read from where it was stored."""
    schema = schema_of(stage, V, packing)
    stored = encode(schema, batch)
    stored.validate(full=True)
    return decode(schema, stored, "a shard")


@fuzz(60, drawn=score_batches())
def test_scores_keep_every_bit(drawn: tuple[FlatBatch, FlatBatch, ScoreModel]) -> None:
    batch, _, model = drawn
    assert problems("score", batch, model.vocab_size) == []
    read = through_a_shard("score", batch, model.vocab_size, None)
    for name, values in batch.arrays.items():
        assert read[name].tobytes() == values.tobytes(), name


@st.composite
def settled(draw: Draw) -> Choice:
    """A method in one of its forms, its parameters anywhere in their ranges."""
    choice = draw(st.sampled_from([each for each in choices() if each.unresolved is None]))
    parameters = {}
    for each in METHODS[choice.method.name].parameters:
        if each.words:
            continue
        value = draw(st.none() | st.floats(each.low, each.high) | st.just(each.high))
        if value is not None and not (each.above and value == each.low):
            parameters[each.name] = value
    return choose(choice.method.name, choice.form, parameters)


@fuzz(
    150,
    drawn=score_batches(),
    choice=settled(),
    top_p=st.floats(0, 1, exclude_min=True),
    max_support=st.integers(1, 50),
    precision=st.sampled_from(PRECISIONS),
)
def test_targets_of_any_scores(
    drawn: tuple[FlatBatch, FlatBatch, ScoreModel],
    choice: Choice,
    top_p: float,
    max_support: int,
    precision: Precision,
) -> None:
    batch, teacher_batch, model = drawn
    V = model.vocab_size
    evidence = Evidence(batch, model, teacher_batch, model)
    truncation = Truncation(top_p, max_support)
    with np.errstate(all="raise", under="ignore"):
        targets = made_or_refused(lambda: targets_of(evidence, choice, truncation))
    if targets is None:
        return
    flat = flat_targets(evidence, targets)
    assert problems("build-targets", flat, V) == []
    sums = ceiling_sums(evidence, choice, targets.residual)
    assert all(np.isfinite(each) for each in sums.values()), sums
    packing = Packing(precision, V, min(V, 1 + max_support), tuple(range(V // 2)))
    read = through_a_shard("build-targets", flat, V, packing)
    assert problems("build-targets", read, V) == []
    assert_near(as_maps(flat), as_maps(read), precision)


def as_maps(batch: FlatBatch) -> list[dict[int, float]]:
    """Each position's probabilities by id, that of the tail by -1."""
    ends = np.cumsum(batch["counts"])
    pairs = list(zip(batch["support_ids"].tolist(), batch["support_probs"].tolist(), strict=True))
    return [
        dict(pairs[end - count : end]) | {-1: tail}
        for end, count, tail in zip(ends, batch["counts"], batch["tail_mass"].tolist(), strict=True)
    ]


# nats between a probability and its nearest level, above a millionth and below
STEPS = {"uint8": (0.1501, 3.56), "float16": (0.016, 0.032), "float32": (1e-5, 1e-5)}


def assert_near(
    wanted: list[dict[int, float]], found: list[dict[int, float]], precision: Precision
) -> None:
    """The same ids; probabilities as near as the precision allows, and adding up to 1."""
    high, low = STEPS[precision]
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys()
        assert abs(sum(other.values()) - 1) < 1e-6
        for token, prob in one.items():
            assert (other[token] == 0) == (prob == 0) or prob < SMALLEST, (token, prob)
            if prob > SMALLEST:  # scaling to 1 moves all by what the largest was rounded by
                off = abs(np.log(other[token] / prob))
                assert off <= high + (high if prob > 1e-6 else low), (token, prob, other[token])


@st.composite
def residuals(draw: Draw) -> tuple[int, list[dict[int, float]]]:
    """Any float32 numbers that add up to about 1 at each position, that of the tail by -1."""
    V = draw(st.sampled_from([2, 300, 2**16, 2**20, 2**20 + 1, 2**31 - 1]))
    near_edges = st.integers(0, V - 1) | st.integers(max(0, V - 3), V - 1)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        logs = draw(st.dictionaries(near_edges, levels, min_size=1, max_size=20))
        logs[-1] = draw(levels)
        values = np.array(list(logs.values()))
        assume(np.isfinite(values).any())
        probs = np.exp(values - np.logaddexp.reduce(values)).astype(np.float32)
        rows.append(dict(zip(logs, probs.tolist(), strict=True)))
    return V, rows


@fuzz(
    150,
    drawn=residuals(),
    precision=st.sampled_from(PRECISIONS),
    listed=st.lists(st.integers(0, 2**31), unique=True, max_size=20),
)
def test_packing_of_anything(
    drawn: tuple[int, list[dict[int, float]]], precision: Precision, listed: list[int]
) -> None:
    V, rows = drawn
    counts = np.array([len(row) - 1 for row in rows], np.int32)
    entries = [[(token, prob) for token, prob in row.items() if token >= 0] for row in rows]
    N = len(rows)
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": np.zeros(N + 1, np.int32),
        "positions": np.arange(1, N + 1, dtype=np.int32),
        "trust": np.ones(N, np.float32),
        "weights": np.ones(N, np.float32),
        "counts": counts,
        "support_ids": np.array([token for row in entries for token, _ in row], np.int32),
        "support_probs": np.array([prob for row in entries for _, prob in row], np.float32),
        "tail_mass": np.array([row[-1] for row in rows], np.float32),
    }
    lengths = {"token": N + 1, "position": N, "entry": int(counts.sum())}
    batch = FlatBatch(["a"], arrays, {name: np.array([each]) for name, each in lengths.items()})
    frequent = tuple(dict.fromkeys(each % V for each in listed))
    packing = Packing(precision, V, min(V, 65), frequent)
    read = through_a_shard("build-targets", batch, V, packing)
    assert_near(as_maps(batch), as_maps(read), precision)
    again = through_a_shard("build-targets", read, V, packing)
    assert_near(as_maps(read), as_maps(again), precision)
