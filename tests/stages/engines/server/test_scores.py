"""Scores of a server are those of transformers, asked for within bounds."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.engines.choose import make_scorer
from qpipe.tests.support.examples import unweighted

from .fake import EXAMPLES, VOCAB, Fake, assert_same, run, settings_for


@pytest.mark.parametrize("top_k", [1, 8, VOCAB])
def test_scores_are_those_of_transformers(
    fake: Fake, expected: Callable[[int], list[ScoredExample]], top_k: int
) -> None:
    assert_same(run(fake, top_k), expected(top_k))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_requests_under_way_are_bounded(fake: Fake, concurrency: int) -> None:
    fake.delay = 0.05
    run(fake, concurrency=concurrency)
    assert fake.most_at_a_time == concurrency


def test_examples_are_taken_as_there_is_room(fake: Fake) -> None:
    taken: list[int] = []

    class Counted(list[WeightedExample]):
        def __iter__(self) -> Iterator[WeightedExample]:
            for place in range(len(self)):
                taken.append(place)
                yield self[place]

    scores = make_scorer(fake.files, settings_for(fake, concurrency=2)).score(Counted(EXAMPLES), 4)
    next(iter(scores))
    assert len(taken) == 2


@pytest.mark.parametrize("generates", [True, False])
def test_the_path_without_decoding_is_used_where_it_is(
    fake: Fake, generates: bool, expected: Callable[[int], list[ScoredExample]]
) -> None:
    fake.generates = generates
    assert_same(run(fake), expected(8))
    scorer: Any = make_scorer(fake.files, settings_for(fake))
    assert scorer.generates is generates


def test_tokens_that_tie_within_the_top_k_share_the_last_rank(fake: Fake) -> None:
    """vLLM numbers them one after the other."""

    class Tied:
        def __call__(self, ids: torch.Tensor) -> Any:
            logits = torch.zeros(1, ids.shape[1], VOCAB)
            logits[..., 7] = 3.0
            logits[..., [1, 9, 200]] = 2.0
            return SimpleNamespace(logits=logits)

    fake.model = Tied()
    scorer = make_scorer(fake.files, settings_for(fake))
    tied = unweighted(
        "tied", np.array([0, 9, 7, 1, 200], np.int32), np.arange(1, 5, dtype=np.int32)
    )
    ((_, found),) = scorer.score([tied], 8)
    assert found.observed_ranks.tolist() == [4, 1, 4, 4]


def test_the_key_of_the_environment_is_sent(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    run(fake)
    assert fake.headers["Authorization"] == "Bearer secret"


def test_a_server_without_a_tokenizer_service_will_do(fake: Fake) -> None:
    fake.tokenizes = lambda ids: None
    assert len(run(fake)) == len(EXAMPLES)
