"""A real engine's supervised rows and shared beginnings: the scores of vLLM's own way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.engines import vllm_engine
from qpipe.stages.engines.base import GivenIds
from qpipe.stages.engines.vllm_engine import by_beginning
from qpipe.tests.support.examples import unweighted


def chat(seed: int, shared: list[int], own: int, first: int) -> WeightedExample:
    """`shared` tokens, then `own` random ones; supervised from token `first` on."""
    tokens = np.random.default_rng(seed).integers(0, 320, own)
    ids = np.concatenate([shared, tokens]).astype(np.int32)
    return unweighted(f"e{seed}", ids, np.arange(first, len(ids), 2, dtype=np.int32))


PREFIX = np.random.default_rng(99).integers(0, 320, 140).tolist()
CHATS = [
    chat(0, [*PREFIX, 0], 59, 150),  # the first in order
    chat(1, [], 33, 5),
    chat(2, PREFIX, 80, 141),
    chat(3, PREFIX, 20, 100),  # supervised inside the shared beginning
    chat(4, PREFIX, 7, 141),
    chat(5, [], 200, 120),
]
AT = [GivenIds(np.full(len(one.positions), 2, np.int32), np.tile([7, 319], len(one.positions)))
      for one in CHATS]  # fmt: skip


def score(scorer: Any, at: Any = None) -> list[ScoredExample]:
    by_place = dict(scorer.score(CHATS, 8, at))
    return [by_place[place] for place in range(len(CHATS))]


def check_close(results: list[ScoredExample], others: list[ScoredExample]) -> None:
    for one, other in zip(results, others, strict=True):
        np.testing.assert_allclose(one.observed_log_probs, other.observed_log_probs, atol=1e-5)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=1e-5)
        np.testing.assert_array_equal(one.observed_ranks, other.observed_ranks)
        np.testing.assert_array_equal(one.topk_ids, other.topk_ids)


@pytest.fixture
def plain(vllm_scorer: Any) -> list[ScoredExample]:
    """The scores by vLLM's own prompt log-probabilities, without a cache."""
    can = vllm_scorer.can
    assert can.rows_alone
    assert can.block_size == 128
    vllm_scorer.can = replace(can, rows_alone=False, block_size=0)
    try:
        return score(vllm_scorer)
    finally:
        vllm_scorer.can = can


@pytest.fixture
def cached(vllm_scorer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each finished request that came from the cache."""
    counts: list[int] = []
    step: Callable[[], list[Any]] = vllm_scorer.engine.step

    def counting() -> list[Any]:
        outputs = step()
        counts.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(vllm_scorer.engine, "step", counting)
    return counts


@pytest.mark.parametrize("alone", [True, False])
def test_shared_beginnings_are_computed_once_and_change_nothing(
    vllm_scorer: Any,
    plain: list[ScoredExample],
    cached: list[int],
    alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_scorer, "can", replace(vllm_scorer.can, rows_alone=alone))
    check_close(score(vllm_scorer), plain)
    # of the four with the beginning, the first computes it, and one is supervised inside of it
    assert sorted(cached) == [0, 0, 0, 0, 128, 128]
    cached.clear()
    check_close(score(vllm_scorer), plain)
    assert sorted(cached) == [0, 0, 0, 0, 128, 128]  # not more, from the earlier call


@pytest.mark.parametrize("alone", [True, False])
def test_an_answer_without_a_supervised_row_is_asked_for_again(
    vllm_scorer: Any,
    plain: list[ScoredExample],
    cached: list[int],
    alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def all_read(examples: Any, block_size: int) -> dict[int, bool]:
        return dict.fromkeys(by_beginning(examples, block_size), True)

    monkeypatch.setattr(vllm_engine, "by_beginning", all_read)
    monkeypatch.setattr(vllm_scorer, "can", replace(vllm_scorer.can, rows_alone=alone))
    check_close(score(vllm_scorer), plain)
    assert len(cached) == len(CHATS) + 1
    assert sorted(cached) == [0, 0, 0, 0, 128, 128, 128]


def test_supervised_rows_alone_are_vllms_own_bits(
    vllm_scorer: Any, plain: list[ScoredExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_scorer, "can", replace(vllm_scorer.can, block_size=0))
    for one, other in zip(score(vllm_scorer), plain, strict=True):
        np.testing.assert_array_equal(one.topk_log_probs, other.topk_log_probs)
        np.testing.assert_array_equal(one.observed_log_probs, other.observed_log_probs)
        np.testing.assert_array_equal(one.observed_ranks, other.observed_ranks)
    with_ids = score(vllm_scorer, AT)
    for one, other in zip(with_ids, plain, strict=True):
        np.testing.assert_array_equal(one.observed_log_probs, other.observed_log_probs)
        starts = np.cumsum(one.counts) - one.counts
        rows = [set(row) for row in np.split(one.topk_ids, starts[1:])]
        assert all({7, 319} <= row for row in rows)


def test_the_order_of_a_shard_puts_equal_beginnings_together() -> None:
    def example(ids: list[int], first: int) -> WeightedExample:
        return unweighted("e", np.array(ids, np.int32), np.array([first], np.int32))

    examples = [
        example([1, 2, 3, 4, 5], 4),
        example([9, 9, 9], 1),
        example([1, 2, 3, 4, 9, 9], 4),  # shares two blocks, and row 3 is in the second
        example([1, 2, 3, 300, 5], 3),  # shares one block, which ends before row 2
        example([9, 9, 9, 9], 1),
        example([1, 2], 1),
        example([2, 1], 1),
    ]
    order = by_beginning(examples, block_size=2)
    assert list(order) == [5, 0, 2, 3, 6, 1, 4]
    assert [bool(reads) for reads in order.values()] == [
        True,  # row 0, and nothing is before it
        True,  # shares one block; row 3
        False,
        True,
        True,  # shares nothing
        True,
        False,
    ]
