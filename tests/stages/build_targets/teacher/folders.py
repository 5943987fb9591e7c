"""Score folders of seven demonstrations under a base and a teacher, and what is built of both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.shard_run import StageResult
from qpipe.pipeline.format.records import ScoredExample, TargetExample
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.inputs import open_inputs
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.build_targets.teacher import Teacher
from qpipe.tests.support.examples import dense_scored
from qpipe.tests.support.folders import in_shards, seal_shards

from ..made import by_position

VOCAB = 12
NUMBERS = range(7)
SHORTER = 0  # a demonstration whose last token is not supervised


def scored(number: int, seed: int = 0, name: str = "", known: int = VOCAB) -> ScoredExample:
    """Demonstration `number`, of one position more, under a model that the seed decides.

    The model knows the first `known` ids; the observed token is one of them.
    """
    tokens = np.random.default_rng(number)
    size = number + 1
    input_ids = tokens.integers(0, 6, size + 3)
    positions = np.sort(tokens.choice(np.arange(1, size + 3), size, replace=False))
    logits = np.random.default_rng((seed, number)).standard_normal((size, known))
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return dense_scored(name or f"chats:{number}", input_ids, positions, log_probs, top_k=known)


def folder_of(
    folder: Path, examples: Sequence[ScoredExample], shard_size: int = 3, **settings: Any
) -> Path:
    """A score folder of these examples."""
    given = {"vocab_size": VOCAB, "top_k": VOCAB, "tokenizer_hash": "3fa9" * 16} | settings
    shards = in_shards(examples, shard_size)
    seal_shards(folder, "score", given, shards, inputs={"of": folder.name})
    return folder


def base_examples(numbers: Sequence[int] = NUMBERS) -> list[ScoredExample]:
    return [scored(number) for number in numbers]


def taught(numbers: Sequence[int] = NUMBERS) -> list[ScoredExample]:
    return [scored(number, seed=1) for number in numbers]


def build(base: Path, teacher: Path, method: str = "target-sft", **options: Any) -> StageResult:
    out = base.parent / f"targets-{teacher.name}-{method}"
    settings = {"top_p": 1.0} | options
    return build_targets(
        BuildSettings(base, out, choose(method), (teacher,), **{"precision": "float32"} | settings)
    )


def built(base: Path, teacher: Path, method: str = "target-sft") -> list[TargetExample]:
    build(base, teacher, method)
    return list(read_targets(base.parent / f"targets-{teacher.name}-{method}"))


def refusal(base: Path, teacher: Path, method: str = "target-sft") -> str:
    """Why a build is refused; it seals nothing."""
    out = base.parent / f"targets-{teacher.name}-{method}"
    with pytest.raises(UserError) as refused:
        build(base, teacher, method)
    assert not (out / "manifest.json").exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def join_of(base: Path, teacher: Path) -> Teacher:
    joined = open_inputs(base, [teacher]).teacher
    assert isinstance(joined, Teacher)
    return joined


def dense_of(example: ScoredExample) -> NDArray[np.float64]:
    """The whole distribution at each position, [N, V]."""
    probs = np.zeros((len(example.counts), VOCAB))
    ids = by_position(example.counts, example.topk_ids)
    log_probs = by_position(example.counts, example.topk_log_probs)
    for n, (row, values) in enumerate(zip(ids, log_probs, strict=True)):
        probs[n, row] = np.exp(values)
    return probs
