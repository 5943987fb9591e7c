"""`qpipe verify --rescore`: compares a score folder with transformers in float32.

Some examples are scored again, one at a time, over the whole vocabulary in float32. The difference
is the error of the engine and its number format and, if the reference is the original of a
quantised model, of the quantisation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.format.batches import split
from ...pipeline.format.ragged import segment_sums
from ...pipeline.format.records import ScoredExample
from ...pipeline.progress import progress_bar
from ...trainer.models.files import ModelFiles, find_model, load_scoring_model

MANY_TIES = 0.05  # float32 logits give far fewer, bfloat16 ones about half
_POSITIONS_FOR_TIES = 20_000


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

    `model` defaults to the model named in the manifest, if it is on this machine. Raises UserError
    if its weights have changed, or if a given model has another tokenizer or vocabulary.
    """
    scores = open_sealed(folder, "score")
    files = _reference(scores, model, revision)
    weights_hash = scores.settings.get("weights_hash")
    same_weights = None if weights_hash is None else weights_hash == files.weights_hash()
    if model is None and weights_hash is not None and not same_weights:
        raise UserError(
            f"{folder}: was scored with weights of hash {weights_hash[:12]}…, model {files.name} "
            f"now has {files.weights_hash()[:12]}…: give --model"
        )
    size = scores.size
    chosen = np.random.default_rng(seed).choice(size, min(examples, size), replace=False)
    log_probs = _dense_scorer(files)
    found = []
    with progress_bar(total=len(chosen), desc="rescore", unit="demo") as progress:
        for example in examples_at(scores, sorted(chosen.tolist())):
            found.append(_differences(example, log_probs(example)))
            progress.update()
    observed_N, entries_K, ranks_N, has_other_mode_N, kl_N = map(
        np.concatenate, zip(*found, strict=True)
    )
    return Rescored(
        dtype=scores.settings.get("dtype", "unknown"),
        engine=scores.settings.get("engine") or f"import from {scores.settings['imported']}",
        same_weights=same_weights,
        examples=len(found),
        positions=len(observed_N),
        observed=float(observed_N.max()),
        entries=float(entries_K.max()),
        observed_mean=float(observed_N.mean()),
        ranks_changed=int((ranks_N > 0).sum()),
        rank=int(ranks_N.max()),
        modes_changed=int(has_other_mode_N.sum()),
        kl_mean=float(kl_N.mean()),
        kl_max=float(kl_N.max()),
    )


def tied_share(folder: SealedFolder) -> float:
    """The share of neighbouring entries with equal log-probabilities, in the first positions.

    0 for packed scores: their codes tie where the log-probabilities did not.
    """
    if folder.schema.packing is not None:
        return 0.0
    ties = neighbours = positions = 0
    for batch in (batch for shard in range(len(folder.shards)) for batch in folder.batches(shard)):
        example: ScoredExample
        for example in split(folder.schema, batch):
            starts = np.cumsum(example.counts)[:-1]  # of every position but the first
            same_position = np.ones(max(0, len(example.topk_ids) - 1), bool)
            same_position[starts - 1] = False
            ties += int(((np.diff(example.topk_log_probs) == 0) & same_position).sum())
            neighbours += int(same_position.sum())
            positions += len(example.positions)
        if positions >= _POSITIONS_FOR_TIES:
            break
    return ties / neighbours if neighbours else 0.0


def _reference(folder: SealedFolder, model: str | None, revision: str | None) -> ModelFiles:
    """The reference model. Raises UserError if its tokens are not those of the folder."""
    made_by = folder.manifest.provenance
    name = model or made_by["model"]
    if model is None:
        revision = revision or made_by.get("revision")
    try:
        files = find_model(name, revision, local=model is None)
    except UserError as error:
        if model is not None:
            raise
        raise UserError(
            f"{folder.path}: was scored with model {name}, which cannot be loaded by that "
            "name: give --model"
        ) from error
    theirs, ours = folder.settings["tokenizer_hash"], files.tokenizer_hash
    if theirs != ours:
        raise UserError(
            f"{folder.path}: was scored with tokenizer hash {theirs}, model {files.name} has "
            f"{ours}: give the model that scored it, or its original, with --model"
        )
    if folder.settings["vocab_size"] != files.vocab_size:
        raise UserError(
            f"{folder.path}: was scored with a vocabulary of {folder.settings['vocab_size']}, "
            f"model {files.name} has {files.vocab_size}: give the model that scored it with --model"
        )
    return files


def examples_at(folder: SealedFolder, rows: Sequence[int]) -> Iterator[ScoredExample]:
    """Yield the examples at ascending rows; shards without any are not read."""
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


def _dense_scorer(files: ModelFiles) -> Callable[[ScoredExample], NDArray[np.float32]]:
    """A function that scores an example with the reference model in float32, [N, V]."""
    import torch

    model = load_scoring_model(files, torch.float32)

    @torch.inference_mode()
    def log_probs(example: ScoredExample) -> NDArray[np.float32]:
        input_ids = torch.from_numpy(example.input_ids.astype(np.int64))[None].to(model.device)
        logits_TV = model(input_ids=input_ids, use_cache=False).logits[0]
        rows_N = torch.from_numpy(example.positions.astype(np.int64) - 1).to(model.device)
        logits_NV = logits_TV[rows_N].float()
        # torch's log-softmax rounds its sum over a large vocabulary to one side, on a CPU
        shifted_NV = logits_NV - logits_NV.amax(dim=1, keepdim=True)
        return (shifted_NV - shifted_NV.logsumexp(dim=1, keepdim=True)).cpu().numpy()

    return log_probs


def _differences(
    example: ScoredExample, log_probs_NV: NDArray[np.float32]
) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    """The differences between an example's stored scores and fresh log-probabilities.

    Of the observed token's log-probability [N], the entries' log-probabilities [K], the observed
    token's rank [N], whether the mode differs [N], and the KL divergence [N].
    """
    counts_N = example.counts
    N = len(counts_N)
    observed_N1 = log_probs_NV[np.arange(N), example.observed_ids][:, None]
    ranks_N = (log_probs_NV >= observed_N1).sum(axis=1)
    fresh_K = log_probs_NV[np.repeat(np.arange(N), counts_N), example.topk_ids]
    modes_N = example.topk_ids[np.cumsum(counts_N) - counts_N]
    return (
        np.abs(example.observed_log_probs - observed_N1[:, 0]),
        np.abs(example.topk_log_probs - fresh_K),
        np.abs(example.observed_ranks - ranks_N),
        modes_N != log_probs_NV.argmax(axis=1),
        bucket_kl(example, fresh_K),
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
