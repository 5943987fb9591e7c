"""The scorers at given ids."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import ScoredExample
from qpipe.stages.engines.base import GivenIds, Scorer, with_given
from qpipe.stages.engines.base import scored as pack
from qpipe.stages.engines.in_transformers.scorer import TransformersScorer
from qpipe.stages.engines.settings import EngineSettings
from qpipe.tests.support.examples import unweighted
from qpipe.trainer.models.files import find_model

from .folders import SHARDS, TOLERANCE, VOCAB, Dense, check_union, ints, scored_by_hand


def test_entries_are_joined_in_order_and_once() -> None:
    """Three positions: one with ties, one with nothing given, one with nothing new."""
    example = unweighted("e", ints(0, 0, 0, 0), ints(1, 2, 3))
    log = np.log(np.array([[0.4, 0.2], [0.5, 0.3], [0.6, 0.1]], np.float32))
    ids = np.array([[5, 3], [1, 2], [8, 9]])
    top = pack(example, log[:, 0], np.ones(3, np.int32), ids, log, vocab_size=10)
    np.testing.assert_allclose(top.tail_mass, [0.4, 0.2, 0.3], atol=1e-6)
    given = GivenIds(ints(5, 0, 2), ints(3, 9, 7, 1, 4, 9, 8))
    gathered = np.log(np.array([0.2, 0.05, 0.2, 0.01, 0.05, 0.1, 0.6], np.float32))
    result = with_given(top, given, gathered, vocab_size=10)
    assert result.counts.tolist() == [6, 2, 2]
    assert result.topk_ids.tolist() == [5, 3, 7, 9, 4, 1, 1, 2, 8, 9]
    expected = [0.4, 0.2, 0.2, 0.05, 0.05, 0.01, 0.5, 0.3, 0.6, 0.1]
    np.testing.assert_allclose(np.exp(result.topk_log_probs), expected, rtol=1e-6)
    np.testing.assert_allclose(result.tail_mass, [0.09, 0.2, 0.3], atol=1e-6)
    assert (result.topk_ids.dtype, result.topk_log_probs.dtype) == (np.int32, np.float32)


def test_entries_that_are_the_whole_vocabulary_leave_no_tail() -> None:
    """Whatever rounding leaves of 1."""
    example = unweighted("e", ints(0, 0, 0), ints(1, 2))
    log = np.log(np.full((2, 1), 0.5, np.float32))
    top = pack(example, log[:, 0], np.ones(2, np.int32), np.array([[2], [2]]), log, vocab_size=3)
    gathered = np.log(np.array([0.25, 0.125, 0.25], np.float32))
    result = with_given(top, GivenIds(ints(2, 1), ints(0, 1, 1)), gathered, vocab_size=3)
    assert result.topk_ids.tolist() == [2, 0, 1, 2, 1]
    np.testing.assert_allclose(result.tail_mass, [0, 0.25], atol=1e-7)
    assert result.tail_mass[0] == 0


def test_what_is_no_number_is_refused() -> None:
    example = unweighted("e7", ints(0, 0), ints(1))
    log = np.log(np.full((1, 1), 0.5, np.float32))
    top = pack(example, log[:, 0], np.ones(1, np.int32), np.zeros((1, 1), int), log, vocab_size=9)
    nan = np.full(1, np.nan, np.float32)
    with pytest.raises(UserError, match=r"example e7: .* not numbers"):
        with_given(top, GivenIds(ints(1), ints(4)), nan, vocab_size=9)
    nothing = np.full(1, -np.inf, np.float32)
    never = with_given(top, GivenIds(ints(1), ints(4)), nothing, vocab_size=9)
    assert never.counts.tolist() == [2]  # probability 0 is one
    assert never.tail_mass[0] == pytest.approx(0.5)


def test_given_ids_are_cut_to_a_vocabulary_and_laid_out_in_columns() -> None:
    given = GivenIds(ints(2, 0, 3), ints(4, 9, 8, 0, 7))
    assert given.padded().tolist() == [[4, 9, -1], [-1, -1, -1], [8, 0, 7]]
    assert given.padded()[given.padded() >= 0].tolist() == [4, 9, 8, 0, 7]
    below = given.below(8)
    assert (below.counts.tolist(), below.ids.tolist()) == ([1, 0, 2], [4, 0, 7])
    assert GivenIds(ints(0, 0), ints()).padded().shape == (2, 0)


EXAMPLES = [one for shard in SHARDS for one in shard] + [scored_by_hand("g", 256, 7)]
AT = [GivenIds(one.counts, one.topk_ids) for one in EXAMPLES]
AT[1] = GivenIds(ints(0), ints())  # none at all
AT[3] = GivenIds(np.full(12, VOCAB, np.int32), np.tile(np.arange(VOCAB, dtype=np.int32), 12))


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Path:
    """The model of the engine that all tests share."""
    return tiny_model


@pytest.fixture
def vllm(vllm_scorer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real engine as it is without `supervised_rows`, which takes given ids too."""
    monkeypatch.setattr(vllm_scorer, "can", replace(vllm_scorer.can, rows_alone=False))
    return vllm_scorer


def run(scorer: Scorer, top_k: int) -> list[ScoredExample]:
    by_place = dict(scorer.score(EXAMPLES, top_k, AT))
    return [by_place[place] for place in range(len(EXAMPLES))]


def check_all(results: list[ScoredExample], dense: Dense, top_k: int) -> None:
    for result, one, given in zip(results, EXAMPLES, AT, strict=True):
        dense_NV = dense(one)
        check_union(result, given.counts, given.ids, dense_NV, top_k)
        observed_N = dense_NV[np.arange(len(dense_NV)), one.observed_ids]
        np.testing.assert_allclose(result.observed_log_probs, observed_N, **TOLERANCE)
    assert (results[3].counts == VOCAB).all()
    assert not results[3].tail_mass.any()


@pytest.mark.parametrize("top_k", [1, 7, VOCAB])
def test_transformers_gathers_what_the_dense_reference_has(
    teacher: Path, dense: Dense, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 5 rows a chunk, so that the positions of an example fall into several
    monkeypatch.setattr("qpipe.trainer.loss.head.CHUNK_VALUES", 5 * VOCAB)
    model = find_model(str(teacher))
    scorer = TransformersScorer(model, EngineSettings("transformers", "float32", max_length=256))
    check_all(run(scorer, top_k), dense, top_k)


@pytest.mark.parametrize("top_k", [1, 7, VOCAB])
def test_vllm_gathers_what_the_dense_reference_has(
    vllm_scorer: Any, dense: Dense, top_k: int
) -> None:
    assert vllm_scorer.can.rows_alone
    check_all(run(vllm_scorer, top_k), dense, top_k)


def test_a_vllm_that_cannot_score_given_ids_refuses_them(vllm: Any) -> None:
    with pytest.raises(UserError, match=r"cannot score given ids, .*: use --engine transformers"):
        list(vllm.score(EXAMPLES, 3, AT))


def test_of_wide_rows_a_few_tokens_are_in_the_engine_at_a_time(
    vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpipe.stages.engines.vllm_engine.WINDOW_BYTES", 8 * VOCAB)
    waiting: list[int] = []
    add_request = vllm.engine.add_request

    def count(*request: Any) -> Any:
        waiting.append(vllm.engine.get_num_unfinished_requests())
        return add_request(*request)

    monkeypatch.setattr(vllm.engine, "add_request", count)
    assert all((one.counts == VOCAB).all() for _, one in vllm.score(EXAMPLES, VOCAB))
    assert waiting == [0] * len(EXAMPLES)


def test_vllm_without_ids_to_gather_still_fills_its_window(
    vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    add_request = vllm.engine.add_request

    def count(name: str, prompt: Any, sampling: Any) -> Any:
        assert sampling.prompt_logprobs == 3
        waiting.append(vllm.engine.get_num_unfinished_requests())
        return add_request(name, prompt, sampling)

    monkeypatch.setattr(vllm.engine, "add_request", count)
    assert all((one.counts == 3).all() for _, one in vllm.score(EXAMPLES, 3))
    assert waiting == list(range(len(EXAMPLES)))
