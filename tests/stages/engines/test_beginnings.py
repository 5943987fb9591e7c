"""Beginnings that examples share, computed once by transformers, against whole runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.engines.base import GivenIds
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.in_transformers import batches as of_batches
from qpipe.stages.engines.in_transformers import beginnings
from qpipe.stages.engines.in_transformers.batches import Group, groups
from qpipe.stages.engines.in_transformers.beginnings import keeps_beginnings
from qpipe.stages.engines.settings import EngineSettings
from qpipe.tests.support.examples import unweighted
from qpipe.trainer.models.files import find_model

VOCAB = 320
DOCUMENTS = np.random.default_rng(0).integers(0, VOCAB, (2, 120)).astype(np.int32)


def chat(seed: int, beginning: Any, length: int, first: int) -> WeightedExample:
    """`length` tokens after a beginning, supervised from `first` on."""
    rest = np.random.default_rng(seed).integers(0, VOCAB, length)
    ids = np.append(beginning, rest).astype(np.int32)
    return unweighted(f"e{seed}", ids, np.arange(first, len(ids), dtype=np.int32))


CHATS = [
    chat(1, DOCUMENTS[0], 40, 130),
    chat(2, DOCUMENTS[1], 30, 121),
    chat(3, [], 90, 3),
    chat(4, DOCUMENTS[0], 9, 121),  # its first supervised row is the first of its own
    chat(5, DOCUMENTS[0][:100], 50, 140),
    chat(6, DOCUMENTS[0], 40, 60),  # supervised inside of the beginning
    chat(7, DOCUMENTS[1], 30, 125),  # as long as the others: without padding
    chat(8, DOCUMENTS[1], 30, 149),
]
AT = [GivenIds(np.full(len(one.positions), 2, np.int32), np.tile([7, 319], len(one.positions)))
      for one in CHATS]  # fmt: skip


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> Any:
    settings = EngineSettings("transformers", "float32", max_length=256)
    return make_scorer(find_model(str(tiny_model)), settings)


@pytest.fixture
def computed(scorer: Any) -> Iterator[list[int]]:
    """The tokens of each forward pass, padding included."""
    counts: list[int] = []
    assert scorer.reads_beginnings  # the trial is made
    layer = scorer.model.get_input_embeddings()
    hook = layer.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    yield counts
    hook.remove()


def score(scorer: Any, chats: list[WeightedExample], at: Any = None) -> list[ScoredExample]:
    by_place = dict(scorer.score(chats, 8, at))
    return [by_place[place] for place in range(len(chats))]


@pytest.mark.parametrize("at", [None, AT])
def test_scores_after_a_beginning_are_those_of_the_whole(
    scorer: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch, at: Any
) -> None:
    found = score(scorer, CHATS, at)
    once = sum(computed)
    monkeypatch.setattr(scorer, "reads_beginnings", False)
    for one, whole in zip(found, score(scorer, CHATS, at), strict=True):
        np.testing.assert_allclose(one.observed_log_probs, whole.observed_log_probs, atol=1e-5)
        np.testing.assert_allclose(one.topk_log_probs, whole.topk_log_probs, atol=1e-5)
        np.testing.assert_array_equal(one.observed_ranks, whole.observed_ranks)
        np.testing.assert_array_equal(one.topk_ids, whole.topk_ids)
    # 120 and 3 x 30; 100 and 3 x 60; and the two others, padded
    assert (once, sum(computed) - once) == (210 + 280 + 2 * 160, 7 * 160 + 90)


def test_own_beginnings_cost_nothing(
    scorer: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [chat(seed, DOCUMENTS[0][:20], 40 + seed, 40) for seed in range(5)]
    found = score(scorer, chats)
    passes = list(computed)
    monkeypatch.setattr(scorer, "reads_beginnings", False)
    for one, whole in zip(found, score(scorer, chats), strict=True):
        assert one.topk_log_probs.tobytes() == whole.topk_log_probs.tobytes()
    assert passes + passes == computed


def test_a_beginning_stands_for_all_batches_of_its_group(
    scorer: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_batches, "BATCH_TOKENS", 320)
    chats = [chat(seed, DOCUMENTS[0], 20, 121) for seed in range(5)]
    assert len(score(scorer, chats)) == 5
    assert computed == [120, 40, 40, 20]


def test_groups_save_the_most_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every division of a few examples in the order of their tokens."""
    monkeypatch.setattr(of_batches, "LEAST_SHARED", 1)
    monkeypatch.setattr(of_batches, "GROUP_COST", 1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 7))
        chats = [chat(0, rng.integers(0, 2, 6), 1, int(rng.integers(1, 7))) for _ in range(count)]
        found = groups(chats)
        assert sorted(place for group in found for place in group.places) == list(range(count))
        for group in found:
            shared = [chats[place].input_ids[: group.shared].tolist() for place in group.places]
            assert all(one == shared[0] for one in shared)
            assert all(chats[place].positions[0] > group.shared for place in group.places)
        saved = sum((len(group.places) - 1) * group.shared - 1 for group in found[:-1])
        assert found[-1].shared == 0
        assert saved == most_saved(chats)
    assert groups([]) == [Group([])]


def most_saved(chats: list[WeightedExample]) -> int:
    usable = [one for one in chats if one.positions[0] > 1]
    chats = sorted(usable, key=lambda one: one.input_ids.tobytes())

    def of_group(some: list[WeightedExample]) -> int:
        shared = min(int(one.positions[0]) - 1 for one in some)
        while len({one.input_ids[:shared].tobytes() for one in some}) > 1:
            shared -= 1
        return (len(some) - 1) * shared - 1 if shared and len(some) > 1 else 0

    best = [0]
    for end in range(1, len(chats) + 1):
        best.append(max(best[start] + of_group(chats[start:end]) for start in range(end)))
    return best[-1]


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


def of_config(name: str, **options: Any) -> Any:
    config = getattr(transformers, name)(**options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_the_search_for_groups_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_batches, "MOST_TOGETHER", 3)
    found = groups([chat(seed, DOCUMENTS[0], 40, 130) for seed in range(8)])
    assert [len(group.places) for group in found if group.shared] == [3, 3]  # two save nothing


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config", "GemmaConfig", "OlmoConfig"])
def test_models_with_full_attention_go_on_after_a_beginning(name: str) -> None:
    assert keeps_beginnings(of_config(name, **SMALL))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MistralConfig", {"sliding_window": 4}),
        ("Gemma3TextConfig", {"sliding_window": 4}),
        ("MambaConfig", {"state_size": 4}),
        ("Qwen3NextConfig", {}),
    ],
)
def test_windows_and_recurrent_layers_do_not(name: str, options: dict[str, Any]) -> None:
    assert not keeps_beginnings(of_config(name, **SMALL | options))


def test_a_model_that_goes_on_otherwise_is_noticed(
    scorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scorer.reads_beginnings
    monkeypatch.setattr(beginnings.Beginning, "inputs", lambda *_: {"use_cache": True})
    assert not keeps_beginnings(scorer.model)
