"""A sealed score folder as `qpipe build-targets` reads it."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...pipeline.folders.manifest import Manifest
from ...pipeline.folders.sealed import folder_schema, read_shard, shard_ids
from ...pipeline.folders.shards import BATCH_ROWS
from ...pipeline.format.batches import FlatBatch, cut
from ...pipeline.format.id_order import rank_order
from ...pipeline.targets.build import Model, Truncation
from ...pipeline.targets.distributions import known_supports, padded, truncated

PIECE_POSITIONS = 2048  # fewer, and Python takes more of the time than numpy
SAMPLED_BATCHES, SAMPLED_POSITIONS, SAMPLED_ENTRIES = 64, 2**14, 64


@dataclass(frozen=True)
class ScoreFolder:
    """A sealed score folder."""

    path: Path
    manifest: Manifest
    temperature: float = 1.0

    @property
    def model(self) -> Model:
        """How its distributions are to be read."""
        settings = self.manifest.settings
        return Model(settings["top_k"], settings["vocab_size"], self.temperature)

    def batches(self, index: int) -> Iterator[FlatBatch]:
        """The batches of a shard."""
        return read_shard(self.path, self.manifest, self.manifest.shards[index])

    def frequent_ids(self, truncation: Truncation, vocab_size: int) -> tuple[int, ...]:
        """The ids below a limit that are stored most often, in an order that packs them well.

        They are told from a sample, spread evenly over the folder and the same whoever takes it.
        """
        filled = [entry for entry in self.manifest.shards if entry.rows]  # subsets have others
        shards = filled[:: max(1, len(filled) // SAMPLED_BATCHES)]
        each = SAMPLED_BATCHES // len(shards) or 1
        batches = sum(min(each, -(-entry.rows // BATCH_ROWS)) for entry in shards)
        schema, most = folder_schema(self.manifest), SAMPLED_POSITIONS // max(1, batches)
        stored = [
            _stored_ids(piece, truncation)
            for entry in shards
            for batch in islice(read_shard(self.path, self.manifest, entry, verify=False), each)
            for piece in cut(schema, batch, most)[:1]
        ]
        ids_NS = np.concatenate(stored)
        share = len(ids_NS) / self.manifest.totals["positions"]
        return rank_order(np.where(ids_NS < vocab_size, ids_NS, -1), share)

    def pieces(self, batch: FlatBatch) -> list[FlatBatch]:
        """A batch cut into pieces whose arrays stay small."""
        return cut(folder_schema(self.manifest), batch, PIECE_POSITIONS)

    def ids(self) -> Iterator[list[list[str]]]:
        """The ids of the examples, for each shard batch by batch."""
        return (shard_ids(self.path, self.manifest, entry) for entry in self.manifest.shards)


def _stored_ids(batch: FlatBatch, truncation: Truncation) -> NDArray[np.int32]:
    """What is kept of each position, its first SAMPLED_ENTRIES, −1 where there are fewer."""
    kept = truncated(known_supports(batch), batch.observed_ids, *astuple(truncation))
    ids_NS = padded(kept.counts, kept.ids, -1)[:, :SAMPLED_ENTRIES]
    lacking = SAMPLED_ENTRIES - ids_NS.shape[1]
    return np.pad(ids_NS, ((0, 0), (0, lacking)), constant_values=-1)
