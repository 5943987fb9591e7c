"""Score folders made by hand, and what a folder made at one must hold."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qpipe.pipeline.format.records import Example, ScoredExample
from qpipe.stages.score.settings import ScoreSettings
from qpipe.tests.support.folders import seal_shards
from qpipe.tests.support.settings import score_settings
from qpipe.trainer.models.files import find_model

VOCAB = 320
# nats; float32 against float64, whose logits are of some ten nats
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}

Dense = Callable[[Example], NDArray[np.float64]]


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def scored_by_hand(
    name: str, tokens: int, seed: int, largest: int = VOCAB - 1, k: int = 6
) -> ScoredExample:
    """An example with random ids, 1 to k at each position, and weights other than 1."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, VOCAB, tokens).astype(np.int32)
    positions = np.sort(rng.choice(np.arange(1, tokens), min(tokens - 1, 12), replace=False))
    N = len(positions)
    counts_N = rng.integers(1, k + 1, N)
    ids = [rng.choice(largest + 1, size, replace=False) for size in counts_N]
    return ScoredExample(
        id=name,
        input_ids=input_ids,
        positions=positions.astype(np.int32),
        observed_log_probs=np.full(N, -1.0, np.float32),
        observed_ranks=np.ones(N, np.int32),
        counts=counts_N.astype(np.int32),
        topk_ids=np.concatenate(ids).astype(np.int32),
        topk_log_probs=np.full(counts_N.sum(), -9.0, np.float32),
        tail_mass=np.full(N, 0.5, np.float32),
        token_weights=rng.random(N).astype(np.float32),
    )


def make_folder(
    folder: Path, model: Path, shards: Sequence[Sequence[ScoredExample]], **settings: Any
) -> Path:
    """Seal a score folder of these shards, as if made with the model's tokenizer."""
    own = {
        "weights_hash": "of the base",
        "tokenizer_hash": find_model(str(model)).tokenizer_hash,
        "vocab_size": VOCAB,
        "engine": "vllm",
        "dtype": "bfloat16",
        "top_k": 6,
        "max_length": 200,
        "too_long": "cut",
        "format": "alpaca",
        "template_hash": "of the template",
        "supervise": "last",
        "shard_size": 3,
    } | settings
    inputs, provenance = {"chats.jsonl": "0123"}, {"model": "base"}
    seal_shards(
        folder,
        "score",
        own,
        [list(shard) for shard in shards],
        inputs=inputs,
        provenance=provenance,
    )
    return folder


SHARDS = [
    [scored_by_hand("a", 40, 1), scored_by_hand("b", 2, 2), scored_by_hand("c", 200, 3)],
    [],  # all of its demonstrations were rejected
    [scored_by_hand("d", 17, 4), scored_by_hand("e", 90, 5)],
    [scored_by_hand("f", 33, 6)],
]


def another_model(folder: Path, like: Path, seed: int, vocab_size: int = VOCAB) -> Path:
    """A model of the same form and tokenizer, with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(like, folder)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(like, vocab_size=vocab_size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def settings(model: Path, at: Path, out: Path, **options: Any) -> ScoreSettings:
    given = {"engine": "transformers", "top_k": 5} | options
    return score_settings(model=str(model), at=at, out=out, **given)


def by_position(values: NDArray[Any], counts: NDArray[np.int32]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(counts)[:-1])


def check_union(
    result: ScoredExample,
    counts: NDArray[np.int32],
    ids: NDArray[np.int32],
    dense_NV: NDArray[np.float64],
    top_k: int,
) -> None:
    """The entries are the top k and the given ids, in order, each with its own probability."""
    assert len(result.counts) == len(dense_NV) == len(counts)
    entries = zip(
        by_position(result.topk_ids, result.counts),
        by_position(result.topk_log_probs, result.counts),
        by_position(ids, counts),
        result.tail_mass,
        dense_NV,
        strict=True,
    )
    for stored, log_probs, given, tail, dense_V in entries:
        top = np.argsort(-dense_V)[:top_k]
        assert len(set(stored.tolist())) == len(stored)
        assert set(stored.tolist()) == set(top.tolist()) | set(given.tolist())
        assert (np.diff(log_probs) <= 0).all()
        np.testing.assert_allclose(log_probs, dense_V[stored], **TOLERANCE)
        assert tail == pytest.approx(1 - np.exp(dense_V[stored]).sum(), abs=TOLERANCE["atol"])
        assert tail >= 0
