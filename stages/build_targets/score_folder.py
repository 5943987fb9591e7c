"""How `qpipe build-targets` reads a score folder: as which model, in pieces, with which packing."""

from dataclasses import astuple
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.folders.shards import BATCH_ROWS
from ...pipeline.format.batches import FlatBatch, cut
from ...pipeline.format.id_order import rank_order
from ...pipeline.targets.build import ScoreModel, Truncation
from ...pipeline.targets.distributions import known_supports, padded, truncated

PIECE_POSITIONS = 2048  # with fewer, Python takes more of the time than numpy
SAMPLED_BATCHES, SAMPLED_POSITIONS, SAMPLED_ENTRIES = 64, 2**14, 64


def score_model(scores: SealedFolder, temperature: float) -> ScoreModel:
    """The model of a score folder, read at a temperature."""
    return ScoreModel(scores.settings["top_k"], scores.settings["vocab_size"], temperature)


def pieces(scores: SealedFolder, batch: FlatBatch) -> list[FlatBatch]:
    """A batch cut into pieces whose arrays stay small."""
    return cut(scores.schema, batch, PIECE_POSITIONS)


def frequent_ids(scores: SealedFolder, truncation: Truncation, vocab_size: int) -> tuple[int, ...]:
    """The most frequently stored ids below `vocab_size`, in an order that packs well.

    They are counted in a sample spread evenly over the folder, which is the same in every run.
    """
    entries = scores.manifest.shards
    filled = [shard for shard in scores.shards if entries[shard].rows]  # subsets have empty ones
    shards = filled[:: max(1, len(filled) // SAMPLED_BATCHES)]
    each = SAMPLED_BATCHES // len(shards) or 1
    batches = sum(min(each, -(-entries[shard].rows // BATCH_ROWS)) for shard in shards)
    most = SAMPLED_POSITIONS // max(1, batches)
    stored = [
        _stored_ids(piece, truncation)
        for shard in shards
        for batch in islice(scores.batches(shard, verify=False), each)
        for piece in cut(scores.schema, batch, most)[:1]
    ]
    ids_NS = np.concatenate(stored)
    share = len(ids_NS) / scores.manifest.totals["positions"]
    return rank_order(np.where(ids_NS < vocab_size, ids_NS, -1), share)


def _stored_ids(batch: FlatBatch, truncation: Truncation) -> NDArray[np.int32]:
    """The ids kept at each position, at most SAMPLED_ENTRIES, padded with −1."""
    kept = truncated(known_supports(batch), batch.observed_ids, *astuple(truncation))
    ids_NS = padded(kept.counts, kept.ids, -1)[:, :SAMPLED_ENTRIES]
    lacking = SAMPLED_ENTRIES - ids_NS.shape[1]
    return np.pad(ids_NS, ((0, 0), (0, lacking)), constant_values=-1)
