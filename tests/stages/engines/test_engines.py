"""Both engines against a dense float32 reference that runs the model on every prefix alone."""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.pipeline.progress import say_once
from qpipe.stages.engines.base import Scorer
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.in_transformers.batches import batches
from qpipe.stages.engines.settings import ENGINES, EngineSettings
from qpipe.stages.engines.supervised_rows.gather import gathered_log_probs
from qpipe.tests.support.examples import unweighted
from qpipe.tests.support.tiers import slow
from qpipe.trainer.models.files import find_model

VOCAB = 320
TOLERANCE = 1e-4  # nats; two float32 implementations of the same model


def example(seed: int, length: int, positions: list[int]) -> WeightedExample:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
    return unweighted(f"e{seed}", ids, np.array(positions, np.int32))


EXAMPLES = [
    example(0, 12, [1]),  # the first token that has anything before it
    example(1, 5, [1, 2, 3, 4]),
    example(2, 150, [1, 7, 8, 50, 51, 52, 148, 149]),  # the last token
    example(3, 2, [1]),  # the shortest
    example(4, 256, list(range(200, 256))),  # as long as the model takes
    example(5, 60, list(range(1, 60, 3))),
]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Callable[[WeightedExample], NDArray[np.float64]]:
    """Log-probabilities [N, V]: each position from a run of the model on the tokens before it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def log_probs(one: WeightedExample) -> NDArray[np.float64]:
        rows = []
        for position in one.positions:
            prefix = torch.from_numpy(one.input_ids[:position].astype(np.int64))[None]
            rows.append(model(prefix).logits[0, -1].double().log_softmax(-1).numpy())
        return np.stack(rows)

    return log_probs


@pytest.fixture(scope="module", params=ENGINES)
def scorer(request: pytest.FixtureRequest, tiny_model: Path) -> Scorer:
    if request.param == "vllm":
        return request.getfixturevalue("vllm_scorer")
    settings = EngineSettings(request.param, "float32", max_length=256)
    return make_scorer(find_model(str(tiny_model)), settings)


def run(scorer: Scorer, top_k: int) -> list[ScoredExample]:
    by_place = dict(scorer.score(EXAMPLES, top_k))
    return [by_place[place] for place in range(len(EXAMPLES))]


@pytest.mark.parametrize("top_k", [1, 8, VOCAB])
def test_scores_equal_the_dense_reference(
    scorer: Scorer, reference: Callable[[WeightedExample], NDArray[np.float64]], top_k: int
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
    scorer: Scorer, reference: Callable[[WeightedExample], NDArray[np.float64]]
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
    [("transformers", "missing"), ("transformers", "nan"), *slow(("vllm", "missing"))],
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
    settings = EngineSettings(engine, "float32", max_length=256)
    with pytest.raises(UserError, match=name if damage == "missing" else "not numbers"):
        list(make_scorer(find_model(str(folder)), settings).score(EXAMPLES, 4))


def test_examples_keep_their_ids_and_positions(scorer: Scorer) -> None:
    for one, result in zip(EXAMPLES, run(scorer, 1), strict=True):
        assert result.id == one.id
        np.testing.assert_array_equal(result.input_ids, one.input_ids)
        np.testing.assert_array_equal(result.positions, one.positions)


def same_bytes(results: list[ScoredExample], others: list[ScoredExample]) -> None:
    for one, other in zip(results, others, strict=True):
        for field in fields(ScoredExample):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def check_close(results: list[ScoredExample], others: list[ScoredExample]) -> None:
    for one, other in zip(results, others, strict=True):
        np.testing.assert_array_equal(one.observed_ranks, other.observed_ranks)
        np.testing.assert_array_equal(one.topk_ids, other.topk_ids)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=2e-5)
        np.testing.assert_allclose(one.observed_log_probs, other.observed_log_probs, atol=2e-5)


def test_the_same_examples_give_the_same_bytes_whatever_was_scored_before(scorer: Scorer) -> None:
    first = run(scorer, 8)
    list(scorer.score(EXAMPLES[2:4], 3))
    same_bytes(first, run(scorer, 8))


def test_transformers_scores_do_not_depend_on_the_batch(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in another order, in small batches, with other chunks of the head."""
    scorer = make_scorer(
        find_model(str(tiny_model)), EngineSettings("transformers", "float32", max_length=256)
    )
    together = run(scorer, 8)
    check_close(together, [dict(scorer.score([one], 8))[0] for one in EXAMPLES])
    backwards = dict(scorer.score(EXAMPLES[::-1], 8))
    check_close(together, [backwards[len(EXAMPLES) - 1 - place] for place in range(len(EXAMPLES))])
    monkeypatch.setattr("qpipe.stages.engines.in_transformers.batches.BATCH_TOKENS", 320)
    check_close(together, run(scorer, 8))
    monkeypatch.setattr("qpipe.trainer.loss.head.CHUNK_VALUES", 7 * VOCAB)
    check_close(together, run(scorer, 8))


def test_padded_batches_of_transformers_are_attended_without_a_mask(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask, attention computes what is then left out, and on a GPU has no fast kernel."""
    scorer: Any = make_scorer(
        find_model(str(tiny_model)), EngineSettings("transformers", "float32", max_length=256)
    )
    assert scorer.reads_beginnings  # the trial, which has a mask, is made
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def noted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append((len(query), options["attn_mask"], options["is_causal"]))
        return attention(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    list(scorer.score([EXAMPLES[2], example(6, 140, [139])], 8))
    assert {*seen} == {(2, None, True)}


def test_log_probs_of_transformers_are_those_of_float64_over_a_large_vocabulary(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's log-softmax in float32 is wrong by more than 5e-6 nats here."""
    scorer: Any = make_scorer(
        find_model(str(tiny_model)), EngineSettings("transformers", "float32", max_length=256)
    )
    one = EXAMPLES[4]
    logits_NV = 3 * torch.randn(
        len(one.positions), 49152, generator=torch.Generator().manual_seed(0)
    )
    chunks = [(slice(0, 40), logits_NV[:40]), (slice(40, None), logits_NV[40:])]
    monkeypatch.setattr(
        "qpipe.stages.engines.in_transformers.scorer.logit_chunks", lambda *_: chunks
    )
    monkeypatch.setattr(scorer, "vocab_size", 49152)
    (found,) = scorer.score_batch([one], None, 8)
    log_probs_NV = logits_NV.double().log_softmax(dim=1)
    observed_N1 = log_probs_NV.gather(1, torch.from_numpy(one.observed_ids).long()[:, None])
    np.testing.assert_allclose(found.observed_log_probs, observed_N1[:, 0], rtol=0, atol=4e-6)
    top = log_probs_NV.topk(8, dim=1)
    np.testing.assert_allclose(found.topk_log_probs, top.values.flatten(), rtol=0, atol=4e-6)
    np.testing.assert_array_equal(found.topk_ids, top.indices.flatten())
    np.testing.assert_array_equal(found.observed_ranks, (log_probs_NV >= observed_N1).sum(dim=1))


def test_transformers_without_a_known_head_gives_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer: Any = make_scorer(
        find_model(str(tiny_model)), EngineSettings("transformers", "float32", max_length=256)
    )
    known = run(scorer, 8)
    assert scorer.head_form is not None
    monkeypatch.setattr(scorer, "head_form", None)
    for one, other in zip(known, run(scorer, 8), strict=True):
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=TOLERANCE)
        np.testing.assert_array_equal(one.observed_ranks, other.observed_ranks)


def test_transformers_halves_a_batch_that_does_not_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer: Any = make_scorer(
        find_model(str(tiny_model)), EngineSettings("transformers", "float32", max_length=256)
    )
    whole = run(scorer, 8)
    score_batch = scorer.score_batch
    sizes: list[int] = []

    def limited(batch: list[WeightedExample], *rest: Any) -> list[ScoredExample]:
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score_batch(batch, *rest)

    monkeypatch.setattr(scorer, "score_batch", limited)
    say_once.cache_clear()
    most = 2
    check_close(whole, run(scorer, 8))
    assert sizes == [4, 2, 2, 2]
    assert capsys.readouterr().err.count("batches that do not fit are halved") == 1
    most = 0
    with pytest.raises(UserError, match="out of memory at 256 tokens: finished shards are kept"):
        run(scorer, 8)


def test_a_model_that_the_gpu_has_no_room_for_is_one_clear_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    settings = EngineSettings("transformers", "bfloat16", max_length=256)
    with pytest.raises(UserError, match="model tiny: does not fit on the GPU in bfloat16: free"):
        make_scorer(find_model(str(tiny_model)), settings)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_tokens_as_probable_as_the_last_of_the_top_k_count_in_the_rank(top_k: int) -> None:
    """Three tokens tie behind the first; each has rank 4, wherever the top k ends among them."""

    logits = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).repeat(4, 1)
    no_ids = torch.empty(4, 0, dtype=torch.int64)
    _, ranks, *_ = gathered_log_probs(logits, torch.arange(4), no_ids, top_k)
    assert ranks.tolist() == [4, 4, 4, 1]


def test_batches_hold_every_example_once_with_little_padding() -> None:
    lengths = [*np.random.default_rng(0).integers(2, 1200, 500).tolist(), 5000, 4096]
    found = list(batches(lengths))
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        longest = lengths[batch[0]]
        assert longest == max(lengths[place] for place in batch)
        assert len(batch) == 1 or len(batch) * longest <= 4096
    padded = sum(len(batch) * lengths[batch[0]] for batch in found)
    assert padded < 1.05 * sum(lengths)
    assert sum(len(batch) * lengths[batch[0]] >= 1024 for batch in found) > len(found) - 2
    assert list(batches([])) == []
