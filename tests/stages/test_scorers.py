"""Both engines against a dense float32 reference that runs the model on every prefix alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.records import Example, ScoredExample
from qpipe.stages.scorers.base import ENGINES, Scorer, ScorerSettings, make_scorer
from qpipe.trainer.models import find_model

VOCAB = 320
TOLERANCE = 1e-4  # nats; two float32 implementations of the same model


def example(seed: int, length: int, positions: list[int]) -> Example:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
    return Example(f"e{seed}", ids, np.array(positions, np.int32))


EXAMPLES = [
    example(0, 12, [1]),  # the first token that has anything before it
    example(1, 5, [1, 2, 3, 4]),
    example(2, 150, [1, 7, 8, 50, 51, 52, 148, 149]),  # the last token
    example(3, 2, [1]),  # the shortest
    example(4, 256, list(range(200, 256))),  # as long as the model takes
    example(5, 60, list(range(1, 60, 3))),
]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Callable[[Example], NDArray[np.float64]]:
    """Log-probabilities [N, V]: each position from a run of the model on the tokens before it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def log_probs(one: Example) -> NDArray[np.float64]:
        rows = []
        for position in one.positions:
            prefix = torch.from_numpy(one.input_ids[:position].astype(np.int64))[None]
            rows.append(model(prefix).logits[0, -1].double().log_softmax(-1).numpy())
        return np.stack(rows)

    return log_probs


@pytest.fixture(scope="module", params=ENGINES)
def scorer(request: pytest.FixtureRequest, tiny_model: Path) -> Scorer:
    return make_scorer(
        find_model(str(tiny_model)), ScorerSettings(request.param, "float32", max_length=256)
    )


def run(scorer: Scorer, top_k: int) -> list[ScoredExample]:
    by_place = dict(scorer.score(EXAMPLES, top_k))
    return [by_place[place] for place in range(len(EXAMPLES))]


@pytest.mark.parametrize("top_k", [1, 8, VOCAB])
def test_scores_equal_the_dense_reference(
    scorer: Scorer, reference: Callable[[Example], NDArray[np.float64]], top_k: int
) -> None:
    for one, result in zip(EXAMPLES, run(scorer, top_k), strict=True):
        dense_NV = reference(one)
        N = len(one.positions)
        observed_N = dense_NV[np.arange(N), one.input_ids[one.positions]]
        np.testing.assert_allclose(result.observed_log_probs, observed_N, atol=TOLERANCE)
        ids_Nk = result.topk_ids.reshape(N, top_k)
        top_Nk = result.topk_log_probs.reshape(N, top_k)
        assert (np.diff(top_Nk, axis=1) <= 0).all()
        expected_Nk = -np.sort(-dense_NV, axis=1)[:, :top_k]
        np.testing.assert_allclose(top_Nk, expected_Nk, atol=TOLERANCE)
        # each id carries its own probability, and none stands twice
        np.testing.assert_allclose(
            np.take_along_axis(dense_NV, ids_Nk, axis=1), top_Nk, atol=TOLERANCE
        )
        assert all(len(set(row)) == top_k for row in ids_Nk.tolist())
        tail_N = 1 - np.exp(expected_Nk).sum(axis=1)
        np.testing.assert_allclose(result.tail_mass, tail_N, atol=1e-4)
        assert (result.counts == top_k).all()


def test_ranks_count_the_tokens_at_least_as_probable(
    scorer: Scorer, reference: Callable[[Example], NDArray[np.float64]]
) -> None:
    outside = 0
    for one, result in zip(EXAMPLES, run(scorer, 8), strict=True):
        dense_NV = reference(one)
        observed_N1 = dense_NV[np.arange(len(dense_NV)), one.input_ids[one.positions]][:, None]
        lowest = (dense_NV >= observed_N1 + TOLERANCE).sum(axis=1) + 1
        highest = (dense_NV >= observed_N1 - TOLERANCE).sum(axis=1)
        assert (lowest <= result.observed_ranks).all()
        assert (result.observed_ranks <= highest).all()
        outside += int((result.observed_ranks > 8).sum())
    assert outside > 50  # the case that peers lose


def test_full_support_leaves_no_tail(scorer: Scorer) -> None:
    for result in run(scorer, VOCAB):
        assert (result.tail_mass == 0).all()


@pytest.mark.parametrize(
    ("engine", "damage"),
    [("transformers", "missing"), ("transformers", "nan"), ("vllm", "missing")],
)
def test_a_damaged_model_gives_no_scores(
    tiny_model: Path, tmp_path: Path, engine: str, damage: str
) -> None:
    """A missing weight would be random; one that is no number spoils all that follows."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "missing":
        del weights[name]
    else:
        weights[name].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = ScorerSettings(engine, "float32", max_length=256)
    with pytest.raises(UserError, match=name if damage == "missing" else "no numbers"):
        list(make_scorer(find_model(str(folder)), settings).score(EXAMPLES, 4))


def test_examples_keep_their_ids_and_positions(scorer: Scorer) -> None:
    for one, result in zip(EXAMPLES, run(scorer, 1), strict=True):
        assert result.id == one.id
        np.testing.assert_array_equal(result.input_ids, one.input_ids)
        np.testing.assert_array_equal(result.positions, one.positions)
