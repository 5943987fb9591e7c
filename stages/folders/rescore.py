"""`qpipe verify --rescore`: compares a score folder with transformers in float32.

Some examples are scored again, one at a time, over the whole vocabulary in float32. The difference
is the error of the engine and its number format and, if the reference is the original of a
quantised model, of the quantisation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.format.batches import split
from ...pipeline.format.ragged import segment_sums
from ...pipeline.format.records import ScoredExample
from ...pipeline.progress import progress_bar
from ...trainer.models.files import ModelFiles, find_model, load_scoring_model


@dataclass(frozen=True, slots=True)
class Rescored:
    """The differences between stored and fresh scores; log-probabilities in nats."""

    dtype: str
    engine: str
    same_weights: bool | None  # None for a server or an import, whose weights are unknown
    examples: int
    positions: int
    observed: float  # largest difference of the observed token's log-probability
    entries: float  # of a stored entry's log-probability
    observed_mean: float  # mean absolute difference of the observed token's
    ranks_changed: int  # observed tokens whose rank differs
    rank: int  # largest difference of a rank
    modes_changed: int  # positions whose most probable token differs
    kl_mean: float  # KL(fresh ‖ stored) over the stored ids, the rest as one outcome
    kl_max: float


def rescore(
    folder: Path,
    model: str | None = None,
    revision: str | None = None,
    examples: int = 16,
    seed: int = 0,
) -> Rescored:
    """Score some examples of a folder again with transformers in float32.

    `model` defaults to the model named in the manifest. Raises UserError if the weights of that one
    have changed, or a given one has another tokenizer or vocabulary.
    """
    scores = open_sealed(folder, "score")
    files = _reference(scores, model, revision)
    same_weights = _has_same_weights(scores, files)
    if model is None and same_weights is False:
        raise UserError(
            f"{folder}: was scored with weights of hash {scores.settings['weights_hash'][:12]}…, "
            f"model {files.name} has {files.weights_hash()[:12]}… now: give --model"
        )
    total = scores.manifest.totals["rows"]
    chosen = np.random.default_rng(seed).choice(total, min(examples, total), replace=False)
    differences = _Differences()
    scorer = _Dense(files)
    with progress_bar(total=len(chosen), desc="rescore", unit="demo") as progress:
        for example in examples_at(scores, sorted(chosen.tolist())):
            differences.add(example, scorer.log_probs(example))
            progress.update()
    return differences.result(scores.settings, same_weights)


def _reference(folder: SealedFolder, model: str | None, revision: str | None) -> ModelFiles:
    """The model to compare with, whose tokens are those of the folder."""
    made_by = folder.manifest.provenance
    name = model or made_by["model"]
    if model is None:
        revision = revision or made_by.get("revision")
    try:
        files = find_model(name, revision)
    except UserError as error:
        if model is not None:
            raise
        raise UserError(
            f"{folder}: was scored with model {name}, which cannot be loaded by that name: "
            "give --model"
        ) from error
    theirs, ours = folder.settings["tokenizer_hash"], files.tokenizer_hash
    if theirs != ours:
        raise UserError(
            f"{folder.path}: was scored with tokenizer hash {theirs}, model {files.name} has "
            f"{ours}: give --model the one that scored it, or that was quantised for it"
        )
    if folder.settings["vocab_size"] != files.vocab_size:
        raise UserError(
            f"{folder.path}: was scored with a vocabulary of {folder.settings['vocab_size']}, "
            f"model {files.name} has {files.vocab_size}: give --model the one that scored it"
        )
    return files


def _has_same_weights(folder: SealedFolder, files: ModelFiles) -> bool | None:
    theirs = folder.settings.get("weights_hash")
    return None if theirs is None else theirs == files.weights_hash()


def examples_at(folder: SealedFolder, rows: Sequence[int]) -> Iterator[ScoredExample]:
    """The examples at these ascending rows; shards without any are not read."""
    first = 0
    for shard, entry in enumerate(folder.manifest.shards):
        here = [row - first for row in rows if first <= row < first + entry.rows]
        first += entry.rows
        start = 0
        for batch in folder.batches(shard) if here else ():
            for row, example in enumerate(split(folder.schema, batch), start):
                if row in here:
                    yield example
            start += len(batch.ids)


class _Dense:
    """The reference model in float32, scoring one example at a time."""

    def __init__(self, files: ModelFiles) -> None:
        import torch

        self.model = load_scoring_model(files, torch.float32)
        self.device = self.model.device

    def log_probs(self, example: ScoredExample) -> NDArray[np.float32]:
        """[N, V]"""
        import torch

        with torch.inference_mode():
            input_ids = torch.from_numpy(example.input_ids.astype(np.int64))[None].to(self.device)
            logits_TV = self.model(input_ids=input_ids, use_cache=False).logits[0]
            rows_N = torch.from_numpy(example.positions.astype(np.int64) - 1).to(self.device)
            return logits_TV[rows_N].float().log_softmax(dim=1).cpu().numpy()


class _Differences:
    """Accumulates differences over examples."""

    def __init__(self) -> None:
        self.examples = 0
        self.observed: list[NDArray[np.floating]] = []
        self.entries = 0.0
        self.ranks: list[NDArray[np.integer]] = []
        self.modes_changed = 0
        self.kl: list[NDArray[np.floating]] = []

    def add(self, example: ScoredExample, log_probs_NV: NDArray[np.float32]) -> None:
        """Compare an example's stored scores with fresh log-probabilities."""
        N = len(log_probs_NV)
        observed_N1 = log_probs_NV[np.arange(N), example.observed_ids][:, None]
        ranks_N = (log_probs_NV >= observed_N1).sum(axis=1)
        position_K = np.repeat(np.arange(N), example.counts)
        fresh_K = log_probs_NV[position_K, example.topk_ids]
        firsts_N = np.cumsum(example.counts) - example.counts
        self.examples += 1
        self.observed.append(np.abs(example.observed_log_probs - observed_N1[:, 0]))
        self.entries = max(self.entries, float(np.abs(example.topk_log_probs - fresh_K).max()))
        self.ranks.append(np.abs(example.observed_ranks - ranks_N))
        self.modes_changed += int((example.topk_ids[firsts_N] != log_probs_NV.argmax(axis=1)).sum())
        self.kl.append(bucket_kl(example, fresh_K))

    def result(self, settings: dict[str, Any], same_weights: bool | None) -> Rescored:
        """The differences; `settings` are the score folder's."""
        observed, ranks, kl = map(np.concatenate, (self.observed, self.ranks, self.kl))
        return Rescored(
            dtype=settings.get("dtype", "unknown"),
            engine=settings.get("engine") or f"import from {settings['imported']}",
            same_weights=same_weights,
            examples=self.examples,
            positions=len(observed),
            observed=float(observed.max()),
            entries=self.entries,
            observed_mean=float(observed.mean()),
            ranks_changed=int((ranks > 0).sum()),
            rank=int(ranks.max()),
            modes_changed=self.modes_changed,
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
        )


def bucket_kl(example: ScoredExample, fresh_K: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL(fresh ‖ stored) at each position [N], in nats, with all other tokens as one outcome.

    `fresh_K` are the fresh log-probabilities at the stored entries. It is below zero if the stored
    probabilities add up to more than 1, as by rounding to float32 (about 1e-7).
    """
    N = len(example.counts)
    fresh_K = fresh_K.astype(np.float64)
    inside_N = segment_sums(np.exp(fresh_K) * (fresh_K - example.topk_log_probs), example.counts)
    fresh_tail_N = np.maximum(1 - segment_sums(np.exp(fresh_K), example.counts), 0)
    tail_N = example.tail_mass.astype(np.float64)
    both_N = (fresh_tail_N > 0) & (tail_N > 0)
    ratio_N = np.divide(fresh_tail_N, tail_N, out=np.ones(N), where=both_N)
    return inside_N + fresh_tail_N * np.log(ratio_N)
