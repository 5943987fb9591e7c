"""`build-targets`: sparse residuals against a plain reference, and folders end to end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.codec import flatten, split
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.manifest import Identity, identity_schema, read_manifest
from qpipe.pipeline.methods import METHODS, Choice, choose
from qpipe.pipeline.records import Reject, ScoredExample, TargetExample
from qpipe.pipeline.runner import Job, ShardRun, StageResult, open_folder
from qpipe.pipeline.schema import schema_of
from qpipe.pipeline.shards import ShardContent, batches_of
from qpipe.stages import build_targets as stage
from qpipe.stages.build_targets import BuildSettings, base_supports, build_targets, targets_of

Floats = NDArray[np.float64]
SFT_KL = choose("sft+kl")
ALL_CHOICES = [choose(name, form) for name, method in METHODS.items() for form in method.forms]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A demonstration under a prior known in full."""

    input_ids: list[int]  # [T]
    positions: list[int]  # [N]
    log_probs: Floats  # [N, V]

    @property
    def observed(self) -> list[int]:
        return [self.input_ids[position] for position in self.positions]

    def scored(self, top_k: int, name: str = "a") -> ScoredExample:
        """The example as a scorer stores it: each position's top k and what is outside it."""
        order = np.argsort(-self.log_probs, axis=1, kind="stable")
        top = order[:, :top_k]
        rest = [
            math.fsum(math.exp(row[token]) for token in tokens)
            for row, tokens in zip(self.log_probs, order[:, top_k:], strict=True)
        ]
        observed = np.take_along_axis(
            self.log_probs, np.array(self.observed, np.int64)[:, None], axis=1
        )
        return ScoredExample(
            id=name,
            input_ids=np.array(self.input_ids, np.int32),
            positions=np.array(self.positions, np.int32),
            observed_log_probs=observed[:, 0].astype(np.float32),
            observed_ranks=(self.log_probs >= observed).sum(axis=1).astype(np.int32),
            counts=np.full(len(top), top.shape[1], np.int32),
            topk_ids=top.ravel().astype(np.int32),
            topk_log_probs=np.take_along_axis(self.log_probs, top, axis=1)
            .ravel()
            .astype(np.float32),
            tail_mass=np.array(rest, np.float32),
            token_weights=np.ones(len(top), np.float32),
        )


def softmax(logits: Floats) -> Floats:
    """log p of each row of logits."""
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def random_dense(
    seed: int, vocab_size: int = 20, positions: int = 6, spread: float = 2.0, tied: bool = False
) -> Dense:
    """Logits of this spread; tied ones take few values, so that many tokens share each."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((positions, vocab_size))
    tokens = positions + 3
    return Dense(
        input_ids=rng.integers(0, vocab_size, tokens).tolist(),
        positions=sorted(rng.choice(np.arange(1, tokens), positions, replace=False).tolist()),
        log_probs=softmax(np.round(logits) if tied else logits),
    )


def one_position(probs: Sequence[float], observed: int) -> Dense:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([probs], np.float64))
    return Dense([0, observed], [1], log_probs)


def targets(
    scored: Sequence[ScoredExample],
    choice: Choice = SFT_KL,
    top_p: float = 0.99,
    max_support: int = 64,
    vocab_size: int = 20,
) -> list[TargetExample]:
    batch = flatten(schema_of("score", vocab_size), scored)
    made = targets_of(batch, choice, top_p, max_support, vocab_size)
    return list(split(schema_of("build-targets", vocab_size), made))


def by_position(counts: NDArray[Any], values: NDArray[Any]) -> list[list[Any]]:
    ends = np.cumsum(counts)
    return [values[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]


def supports_of(example: TargetExample) -> list[dict[int, float]]:
    """Each position's support as token: probability."""
    ids = by_position(example.counts, example.support_ids)
    probs = by_position(example.counts, example.support_probs)
    return [dict(zip(*pair, strict=True)) for pair in zip(ids, probs, strict=True)]


@dataclass
class Reference:
    ids: list[int]
    probs: list[float]
    tail: float


def reference(scored: ScoredExample, n: int, top_p: float, max_support: int) -> Reference:
    """Position n's residual, entry by entry: the top k from its mode down until `top_p` is held,
    then the observed token if that did not bring it."""
    observed = int(scored.input_ids[scored.positions[n]])
    tail = float(scored.tail_mass[n])
    kept: dict[int, float] = {}
    dropped: dict[int, float] = {}
    ids = by_position(scored.counts, scored.topk_ids)[n]
    log_probs = by_position(scored.counts, scored.topk_log_probs)[n]
    for token, log_prob in zip(ids, log_probs, strict=True):
        full = len(kept) >= max_support or (top_p < 1 and math.fsum(kept.values()) >= top_p)
        (dropped if dropped or full else kept)[token] = math.exp(log_prob)
    if observed in dropped:
        kept[observed] = dropped.pop(observed)
    elif observed not in kept:
        kept[observed] = math.exp(scored.observed_log_probs[n])
        tail = max(tail - kept[observed], 0.0)
    tail += math.fsum(dropped.values())
    total = math.fsum(kept.values()) + tail
    return Reference(list(kept), [prob / total for prob in kept.values()], tail / total)


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "vocab_size": st.integers(2, 40),
        "positions": st.integers(0, 8),
        "spread": st.sampled_from([0.0, 0.5, 2.0, 8.0, 100.0]),
        "tied": st.booleans(),
    }
)
top_ps = st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0]) | st.floats(1e-6, 1)
max_supports = st.sampled_from([1, 2, 5, 64, 10**9])
shares = st.sampled_from([0.0, 0.3, 0.9, 1.0])  # of the vocabulary in the top k


def top_k_of(case: dict[str, Any], share: float) -> int:
    return max(1, round(share * case["vocab_size"]))


@settings(max_examples=150, deadline=None)
@given(case=cases, share=shares, top_p=top_ps, max_support=max_supports)
def test_supports_are_those_of_a_plain_reference(
    case: dict[str, Any], share: float, top_p: float, max_support: int
) -> None:
    scored = random_dense(**case).scored(top_k_of(case, share))
    batch = flatten(schema_of("score", case["vocab_size"]), [scored])
    supports = base_supports(batch, top_p, max_support)

    ids = by_position(supports.counts, supports.ids)
    probs = by_position(supports.counts, supports.probs)
    assert len(ids) == len(supports.tail_mass) == case["positions"]
    for n in range(case["positions"]):
        wanted = reference(scored, n, top_p, max_support)
        assert ids[n] == wanted.ids
        # tail minus observed, both stored as float32, may come out a rounding below 0
        np.testing.assert_allclose(probs[n], wanted.probs, rtol=3e-7)
        np.testing.assert_allclose(supports.tail_mass[n], wanted.tail, rtol=3e-7, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(case=cases, share=shares, top_p=top_ps, max_support=max_supports)
def test_a_support_is_the_smallest_prefix_of_its_mass_and_the_observed_token(
    case: dict[str, Any], share: float, top_p: float, max_support: int
) -> None:
    dense = random_dense(**case)
    top_k = top_k_of(case, share)
    [made] = targets([dense.scored(top_k)], SFT_KL, top_p, max_support, case["vocab_size"])

    for n, (support, observed) in enumerate(zip(supports_of(made), dense.observed, strict=True)):
        ranked = np.argsort(-dense.log_probs[n], kind="stable")[: min(top_k, max_support)].tolist()
        held = [0.0, *np.cumsum(np.exp(dense.log_probs[n][ranked]))]
        sizes = [  # of a smallest prefix; several where rounding decides
            size
            for size in range(1, len(ranked) + 1)
            if held[size - 1] < top_p + 1e-6 and (size == len(ranked) or held[size] > top_p - 1e-6)
        ]
        if top_p == 1:
            sizes = [len(ranked)]
        prefixes = [ranked[:size] for size in sizes]
        wanted = [prefix if observed in prefix else [*prefix, observed] for prefix in prefixes]
        assert list(support) in wanted


@settings(max_examples=100, deadline=None)
@given(case=cases, share=shares, top_p=top_ps, max_support=max_supports)
def test_supports_and_tails_are_the_dense_priors_own(
    case: dict[str, Any], share: float, top_p: float, max_support: int
) -> None:
    dense = random_dense(**case)
    scored = dense.scored(top_k_of(case, share))
    [made] = targets([scored], SFT_KL, top_p, max_support, case["vocab_size"])

    for n, support in enumerate(supports_of(made)):
        probs = np.exp(dense.log_probs[n])
        outside = math.fsum(prob for token, prob in enumerate(probs) if token not in support)
        stored = list(support.values())
        assert math.fsum(stored) + made.tail_mass[n] == pytest.approx(1, abs=1e-6)
        assert made.tail_mass[n] == pytest.approx(outside, abs=1e-6)
        np.testing.assert_allclose(stored, probs[list(support)], atol=1e-6)
        assert all(left >= right for left, right in pairwise(stored))


@pytest.mark.parametrize("choice", ALL_CHOICES, ids=lambda c: f"{c.method.name} {c.form}")
@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_the_target_rebuilt_from_what_is_stored_is_that_of_the_dense_prior(
    choice: Choice, top_k: int
) -> None:
    dense = random_dense(3)
    [made] = targets([dense.scored(top_k)], choice)

    observed_log_probs = dense.log_probs[np.arange(6), dense.observed]
    trust, weights = choice.trust_and_weight(observed_log_probs)
    np.testing.assert_allclose(made.weights, weights, rtol=1e-6)
    for n, support in enumerate(supports_of(made)):
        residual = {
            "base": np.exp(dense.log_probs[n]),
            "uniform": np.full(20, 1 / 20),
            "observed": np.eye(20)[dense.observed[n]],
        }[choice.residual]
        wanted = (1 - trust[n]) * residual
        wanted[dense.observed[n]] += trust[n]
        stored = {token: (1 - float(made.trust[n])) * prob for token, prob in support.items()}
        stored[dense.observed[n]] += float(made.trust[n])
        tail = (1 - float(made.trust[n])) * float(made.tail_mass[n])
        np.testing.assert_allclose(list(stored.values()), wanted[list(stored)], atol=1e-6)
        assert tail == pytest.approx(1 - wanted[list(stored)].sum(), abs=1e-6)


@pytest.mark.parametrize(
    ("observed", "top_p", "max_support", "support", "tail"),
    [
        (0, 0.85, 64, {0: 0.5, 1: 0.25, 2: 0.125}, 0.125),  # holds 0.875; 0.75 is too little
        (0, 0.7, 64, {0: 0.5, 1: 0.25}, 0.25),
        (0, 1e-9, 64, {0: 0.5}, 0.5),
        (1, 1e-9, 64, {0: 0.5, 1: 0.25}, 0.25),  # observed inside the top k, after the prefix
        (3, 0.4, 64, {0: 0.5, 3: 0.0625}, 0.4375),  # outside the top k of 3
        (4, 0.85, 64, {0: 0.5, 1: 0.25, 2: 0.125, 4: 0.0625}, 0.0625),
        (3, 1.0, 64, {0: 0.5, 1: 0.25, 2: 0.125, 3: 0.0625}, 0.0625),  # the whole top k of 3
        (0, 1.0, 1, {0: 0.5}, 0.5),
        (2, 1.0, 1, {0: 0.5, 2: 0.125}, 0.375),  # the observed token besides
        (1, 1.0, 2, {0: 0.5, 1: 0.25}, 0.25),
    ],
)
def test_supports_worked_out_by_hand(
    observed: int, top_p: float, max_support: int, support: dict[int, float], tail: float
) -> None:
    dense = one_position([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], observed)
    [made] = targets([dense.scored(3)], SFT_KL, top_p, max_support, vocab_size=5)

    [stored] = supports_of(made)
    assert list(stored) == list(support)
    np.testing.assert_allclose(list(stored.values()), list(support.values()), rtol=1e-6)
    assert made.tail_mass.tolist() == [pytest.approx(tail, rel=1e-6)]
    assert made.counts.tolist() == [len(support)]
    assert made.trust.tolist() == [pytest.approx(1 / 1.1)]
    assert made.weights.tolist() == [pytest.approx(1.1)]


def test_top_p_1_keeps_the_whole_top_k_also_where_its_first_entry_is_1_already() -> None:
    dense = one_position([1.0, 1e-20, 1e-21, 1e-22], observed=0)
    [made] = targets([dense.scored(3)], SFT_KL, 1.0, 64, vocab_size=4)

    assert made.support_ids.tolist() == [0, 1, 2]


def test_scores_that_do_not_quite_add_up_are_scaled_to_1() -> None:
    scored = one_position([0.5, 0.25, 0.25], observed=0).scored(2)
    scored.tail_mass[:] = 0.5  # 1.25 together
    [made] = targets([scored], SFT_KL, 0.99, 64, vocab_size=3)

    np.testing.assert_allclose(made.support_probs, [0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(made.tail_mass, [0.4], rtol=1e-6)


def test_equally_probable_tokens_stay_in_the_order_of_the_top_k() -> None:
    dense = one_position([0.1, 0.3, 0.1, 0.3, 0.1, 0.1], observed=4)
    [made] = targets([dense.scored(6)], SFT_KL, 0.65, 64, vocab_size=6)

    assert made.support_ids.tolist() == [1, 3, 0, 4]


@pytest.mark.parametrize("choice", ALL_CHOICES, ids=lambda c: f"{c.method.name} {c.form}")
def test_a_certain_prior_of_another_token_gives_finite_targets(choice: Choice) -> None:
    dense = one_position([0.0, 1.0, 0.0, 0.0], observed=3)
    for top_k, top_p in ((1, 0.99), (4, 0.99), (4, 1.0)):
        [made] = targets([dense.scored(top_k)], choice, top_p, 64, vocab_size=4)
        support = supports_of(made)[0]

        values = [*support.values(), *made.tail_mass, *made.trust, *made.weights]
        assert np.isfinite(values).all()
        assert sum(support.values()) + made.tail_mass[0] == pytest.approx(1)
        assert 3 in support
        if choice.residual == "base":
            assert (support[1], support[3], made.tail_mass[0]) == (1, 0, 0)


def test_an_observed_token_that_is_all_of_the_tail_leaves_a_tail_of_nothing() -> None:
    for seed in range(20):
        dense = random_dense(seed, vocab_size=8, positions=1)
        least = int(np.argmin(dense.log_probs[0]))
        scored = Dense([0, least], [1], dense.log_probs).scored(7)
        [made] = targets([scored], SFT_KL, 1.0, 64, vocab_size=8)

        assert made.counts.tolist() == [8]
        assert 0 <= made.tail_mass[0] < 1e-6
        assert made.support_probs.sum() == pytest.approx(1, abs=1e-6)


def test_a_tail_far_below_float32s_resolution_of_1_survives() -> None:
    dense = one_position([1 - 3e-12, 1e-12, 1e-12, 1e-12], observed=0)
    [made] = targets([dense.scored(2)], SFT_KL, 0.99, 64, vocab_size=4)

    assert made.support_ids.tolist() == [0]
    assert made.tail_mass.tolist() == [pytest.approx(3e-12, rel=1e-5)]


@pytest.mark.parametrize(
    "choice", [choose("sft"), choose("dft", "frozen-weight")], ids=["sft", "dft frozen-weight"]
)
def test_a_method_without_a_residual_stores_the_observed_token_alone(choice: Choice) -> None:
    dense = random_dense(0)
    [made] = targets([dense.scored(5)], choice)

    assert made.counts.tolist() == [1] * 6
    assert made.support_ids.tolist() == dense.observed
    assert made.support_probs.tolist() == [1.0] * 6
    assert made.tail_mass.tolist() == [0.0] * 6
    assert made.trust.tolist() == [1.0] * 6


def test_label_smoothing_stores_the_observed_tokens_uniform_share_and_the_rest_in_the_tail() -> (
    None
):
    dense = random_dense(0)
    [made] = targets([dense.scored(5)], choose("label-smoothing", given={"lam": 0.25}))

    assert made.support_ids.tolist() == dense.observed
    np.testing.assert_allclose(made.support_probs, [1 / 20] * 6)
    np.testing.assert_allclose(made.tail_mass, [19 / 20] * 6)
    np.testing.assert_allclose(made.trust, [0.75] * 6)
    np.testing.assert_allclose(made.weights, [1.0] * 6)


@pytest.mark.parametrize("choice", ALL_CHOICES, ids=lambda c: f"{c.method.name} {c.form}")
def test_batches_of_any_size_give_the_same_targets(choice: Choice) -> None:
    scored = [random_dense(seed, positions=seed % 4).scored(6, str(seed)) for seed in range(9)]
    together = targets(scored, choice, 0.8)
    apart = [example for one in scored for example in targets([one], choice, 0.8)]

    assert [as_bytes(example) for example in together] == [as_bytes(example) for example in apart]


def test_the_same_prior_has_the_same_support_wherever_it_stands() -> None:
    dense = Dense([0] * 1001, list(range(1, 1001)), np.log([[0.6, 0.2, 0.2]] * 1000))
    scored = dense.scored(3)
    top_p = math.exp(float(scored.topk_log_probs[0]))  # held by the first entry, not a bit more
    [made] = targets([scored], SFT_KL, top_p, 64, vocab_size=3)

    assert set(made.counts.tolist()) == {1}


def test_no_examples_and_no_positions_make_empty_targets() -> None:
    empty = random_dense(0, positions=0).scored(5)

    assert targets([]) == []
    [made] = targets([empty])
    assert made.counts.tolist() == made.support_ids.tolist() == made.trust.tolist() == []
    assert made.input_ids.tolist() == empty.input_ids.tolist()


def test_targets_have_the_types_of_the_record() -> None:
    [made] = targets([random_dense(0).scored(5)])

    assert {field.name: getattr(made, field.name).dtype.name for field in fields(made)[1:]} == {
        "input_ids": "int32",
        "positions": "int32",
        "trust": "float32",
        "counts": "int32",
        "support_ids": "int32",
        "support_probs": "float32",
        "tail_mass": "float32",
        "weights": "float32",
    }


# Folders


def as_bytes(record: Any) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value if name == "id" else value.tobytes() for name, value in values.items()}


def score_folder(folder: Path, shard_size: int, engine: str = "transformers") -> Path:
    """Seven demonstrations of up to 6 positions, and a reject, scored under a dense prior."""
    schema = schema_of("score", 20)
    identity = Identity(
        stage="score",
        settings={
            "vocab_size": 20,
            "tokenizer_hash": "3fa9",
            "engine": engine,
            "shard_size": shard_size,
        },
        inputs={"chats.jsonl": "0123"},
        schema=identity_schema(schema),
    )
    scored = [random_dense(seed, positions=seed).scored(6, f"chats:{seed}") for seed in range(7)]

    def content(start: int) -> ShardContent:
        made = ShardContent(batches_of(schema, scored[start : start + shard_size]))
        if start == 0:
            made.rejects.append(Reject("chats.jsonl", 3, "empty"))
        return made

    assert open_folder(folder, identity) is None
    run = ShardRun(Job(folder, schema, identity, {}, {"model": "toy"}))
    starts = range(0, len(scored), shard_size)
    for _ in run.shards((index, partial(content, start)) for index, start in enumerate(starts)):
        pass
    run.seal()
    return folder


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return score_folder(tmp_path / "scores", shard_size=3)


def build(scores: Path, out: Path, method: str = "gift", **options: Any) -> StageResult:
    return build_targets(BuildSettings(scores, out, choose(method), **options))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_score_folder_becomes_a_target_folder_example_for_example(
    scores: Path, tmp_path: Path
) -> None:
    build(scores, tmp_path / "targets", top_p=0.9, max_support=4)

    scored = list(read_scores(scores))
    read = list(read_targets(tmp_path / "targets"))
    wanted = targets(scored, choose("gift"), 0.9, 4)
    assert [example.id for example in read] == [f"chats:{seed}" for seed in range(7)]
    assert [len(example.positions) for example in read] == list(range(7))
    assert [as_bytes(example) for example in read] == [as_bytes(example) for example in wanted]
    for example in read:
        for support, observed in zip(supports_of(example), example.observed_ids, strict=True):
            assert int(observed) in support


def test_the_manifest_says_what_the_targets_are_and_where_from(
    scores: Path, tmp_path: Path
) -> None:
    result = build(scores, tmp_path / "targets", "label-smoothing")
    manifest = read_manifest(tmp_path / "targets", "build-targets")
    source = read_manifest(scores)

    assert result.manifest == manifest
    assert manifest.settings == {
        "method": "label-smoothing",
        "form": "frozen-target",
        "parameters": {"lam": 0.1},
        "residual": "uniform",
        "tail_shape": "uniform",
        "top_p": None,
        "max_support": None,
        "vocab_size": 20,
        "tokenizer_hash": "3fa9",
    }
    assert manifest.identity.inputs == {"scores": source.fingerprint}
    assert manifest.parents["scores"]["identity"]["settings"] == source.settings
    assert manifest.provenance["model"] == "toy"


def test_totals_and_sums_are_those_of_the_examples(scores: Path, tmp_path: Path) -> None:
    result = build(scores, tmp_path / "targets")
    read = list(read_targets(tmp_path / "targets"))
    totals, of_scores = result.manifest.totals, read_manifest(scores).totals

    assert totals["positions"] == result.positions == sum(range(7)) == of_scores["positions"]
    assert totals["rows"] == 7 == of_scores["rows"]
    assert totals["tokens"] == sum(len(example.input_ids) for example in read)
    assert totals["entries"] == sum(len(example.support_ids) for example in read)
    assert totals["sums"]["trust"] == pytest.approx(sum(e.trust.sum() for e in read), rel=1e-6)
    assert totals["sums"]["tail_mass"] == pytest.approx(
        sum(e.tail_mass.sum() for e in read), rel=1e-6
    )


def test_sharding_of_any_size_gives_the_same_examples(tmp_path: Path) -> None:
    made = []
    for size in (1, 2, 3, 7, 100):
        folder = score_folder(tmp_path / f"scores-{size}", size)
        build(folder, tmp_path / f"targets-{size}", top_p=0.8)
        made.append([as_bytes(example) for example in read_targets(tmp_path / f"targets-{size}")])
        assert len(read_manifest(tmp_path / f"targets-{size}").shards) == math.ceil(7 / size)

    assert len(made[0]) == 7
    assert all(examples == made[0] for examples in made)


@pytest.mark.parametrize("stopped_at", [0, 1, 2])
def test_a_stopped_build_goes_on_and_gives_the_same_bytes(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) - 1 == stopped_at:
            raise KeyboardInterrupt
        return targets_of(*arguments)

    build(scores, tmp_path / "undisturbed")
    monkeypatch.setattr(stage, "targets_of", counted)
    with pytest.raises(KeyboardInterrupt):
        build(scores, tmp_path / "targets")
    result = build(scores, tmp_path / "targets")

    assert len(calls) == 3 + 1  # three shards of a batch each, one of them begun twice
    assert result.positions == sum([3, 12, 6][stopped_at:])
    assert folder_bytes(tmp_path / "targets") == folder_bytes(tmp_path / "undisturbed")


def test_a_second_build_does_nothing(scores: Path, tmp_path: Path) -> None:
    first = build(scores, tmp_path / "targets")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()}
    second = build(scores, tmp_path / "targets")

    assert second.manifest == first.manifest
    assert (second.positions, second.seconds) == (0, 0.0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "targets").iterdir()} == before


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("sft+kl", {}, 'settings.method is "gift" there and "sft+kl" now'),
        ("gift", {"top_p": 0.9}, "settings.top_p is 0.99 there and 0.9 now"),
        ("gift", {"max_support": 8}, "settings.max_support is 64 there and 8 now"),
    ],
)
def test_a_folder_built_otherwise_is_refused_and_left_alone(
    scores: Path, tmp_path: Path, method: str, options: dict[str, Any], words: str
) -> None:
    build(scores, tmp_path / "targets")
    before = folder_bytes(tmp_path / "targets")

    with pytest.raises(UserError, match="targets: already holds `qpipe build-targets`") as refused:
        build(scores, tmp_path / "targets", method, **options)

    assert words in str(refused.value)
    assert folder_bytes(tmp_path / "targets") == before


def test_a_folder_built_from_other_scores_is_refused(scores: Path, tmp_path: Path) -> None:
    other = score_folder(tmp_path / "others", shard_size=3, engine="vllm")
    build(scores, tmp_path / "targets")
    of_scores, of_other = read_manifest(scores).fingerprint, read_manifest(other).fingerprint

    with pytest.raises(UserError) as refused:
        build(other, tmp_path / "targets")

    assert f'inputs.scores is "{of_scores}" there and "{of_other}" now' in str(refused.value)


def test_scores_that_are_moved_are_the_same_scores(scores: Path, tmp_path: Path) -> None:
    build(scores, tmp_path / "targets")
    moved = scores.rename(tmp_path / "elsewhere")

    assert build(moved, tmp_path / "targets").positions == 0


def test_the_score_folder_itself_is_no_place_for_the_targets(scores: Path) -> None:
    before = folder_bytes(scores)

    with pytest.raises(UserError, match="already holds `qpipe score` output"):
        build(scores, scores)

    assert folder_bytes(scores) == before


def test_scores_that_cannot_be_read_are_refused_before_anything_is_made(
    scores: Path, tmp_path: Path
) -> None:
    build(scores, tmp_path / "targets")
    (tmp_path / "empty").mkdir()
    for folder, words in [
        (tmp_path / "gone", "gone: no such folder"),
        (tmp_path / "empty", "empty: not a qpipe folder"),
        (tmp_path / "targets", "made by `qpipe build-targets`, but the output of `qpipe score`"),
    ]:
        with pytest.raises(UserError, match=words):
            build(folder, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_unfinished_scores_are_refused(scores: Path, tmp_path: Path) -> None:
    manifest = read_manifest(scores)
    (scores / "manifest.json").unlink()
    open_folder(tmp_path / "fresh", manifest.identity)

    with pytest.raises(UserError, match="fresh: not finished yet: run `qpipe score`"):
        build(tmp_path / "fresh", tmp_path / "out")


def test_a_damaged_score_shard_is_refused_by_name_and_nothing_is_sealed(
    scores: Path, tmp_path: Path
) -> None:
    path = scores / "shard-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(UserError, match=r"scores/shard-00001\.arrow: damaged"):
        build(scores, tmp_path / "targets")
    with pytest.raises(UserError, match="not finished yet: run `qpipe build-targets`"):
        list(read_targets(tmp_path / "targets"))


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_a_top_p_out_of_range_is_refused(tmp_path: Path, top_p: float) -> None:
    with pytest.raises(UserError, match=r"--top-p .* is out of range: give above 0, up to 1"):
        BuildSettings(tmp_path, tmp_path, SFT_KL, top_p=top_p)


@pytest.mark.parametrize("max_support", [0, -1])
def test_a_support_of_nothing_is_refused(tmp_path: Path, max_support: int) -> None:
    with pytest.raises(UserError, match=f"--max-support {max_support} is out of range: give 1"):
        BuildSettings(tmp_path, tmp_path, SFT_KL, max_support=max_support)
