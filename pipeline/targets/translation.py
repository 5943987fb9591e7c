"""A teacher's scores in the base's vocabulary, where the two have other tokenizers.

N positions of the base, M of the teacher. A position is mapped if both have the same token there.
It carries the teacher's distribution: each id whose text the base has too becomes the base's id of
that text, with the teacher's probability, and the mass of all others joins the tail. Every other
position carries the base's own distribution, so that a method finds no difference between the two
models: log(q/b) is 0, and a residual from the teacher is one from the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..format.batches import FlatBatch
from ..format.ragged import segment_sums
from ..format.schema import Column, Schema, schema_of

MAPPED, NOT_ALIGNED, OTHER_TEXT, MISSING = range(4)  # of a position; the last two, of its row
ENOUGH = 0.5  # a share below it is worth a warning


@dataclass(frozen=True, slots=True)
class Mapped:
    """The part of a teacher that was mapped to the base's tokens."""

    name: str
    positions: float  # share of the supervised tokens
    mass: float  # share of the teacher's stored probability at these
    other_text: int  # demonstrations whose supervised text differs
    missing: int  # demonstrations that the teacher lacks

    @property
    def is_little(self) -> bool:
        """Whether less than half was mapped."""
        return min(self.positions, self.mass) < ENOUGH


def translated_schema(vocab_size: int) -> Schema:
    """The schema of `translated`: scores, and what was mapped."""
    scores = schema_of("score", vocab_size)
    own = (
        Column("mapping", "position", np.int32, np.int32),
        Column("known_mass", "position", np.float64, np.float64),
        Column("mapped_mass", "position", np.float64, np.float64),
    )
    return Schema(scores.record, (*scores.columns, *own), vocab_size)


def translated(
    ours: FlatBatch,
    theirs: FlatBatch,
    place_N: NDArray[np.int64],
    mapping_N: NDArray[np.int32],
    our_ids: NDArray[np.int32],
) -> FlatBatch:
    """Scores of the base's examples `ours` with the teacher's distributions, where there are some.

    `place_N` is the teacher's position for each of the base's that is MAPPED in `mapping_N`;
    `our_ids` the base's id for each of the teacher's, or −1.
    """
    is_mapped = mapping_N == MAPPED
    both = {name: np.concatenate([theirs[name], ours[name]]) for name in _SCORES}
    M = len(theirs["counts"])
    source_N = np.where(is_mapped, place_N, M + np.arange(len(place_N)))
    arrays = {name: both[name][source_N] for name in _SCORES if not name.startswith("topk_")}
    starts = np.cumsum(both["counts"]) - both["counts"]
    counts = arrays["counts"].astype(np.int64)
    first = np.cumsum(counts) - counts
    entry_K = np.arange(counts.sum()) + np.repeat(starts[source_N] - first, counts)

    ids_K = np.concatenate([our_ids[theirs["topk_ids"]], ours["topk_ids"]])[entry_K]
    log_probs_K = both["topk_log_probs"][entry_K]
    is_kept = ids_K >= 0
    probs_K = np.exp(log_probs_K.astype(np.float64))
    lost_N = segment_sums(np.where(is_kept, 0.0, probs_K), counts)
    arrays["counts"] = segment_sums(is_kept.astype(np.int32), counts)
    arrays["topk_ids"], arrays["topk_log_probs"] = ids_K[is_kept], log_probs_K[is_kept]
    tail_N = arrays["tail_mass"]
    arrays["tail_mass"] = np.where(lost_N > 0, tail_N + lost_N, tail_N).astype(np.float32)

    # the observed token is known as well, and mapped
    is_observed = ids_K == np.repeat(ours.observed_ids, counts)
    outside = segment_sums(is_observed.astype(np.int64), counts) == 0
    extra_N = np.where(outside, np.exp(arrays["observed_log_probs"].astype(np.float64)), 0.0)
    known_N = np.where(is_mapped, segment_sums(probs_K, counts) + extra_N, 0.0)
    arrays |= {
        "mapping": mapping_N,
        "known_mass": known_N,
        "mapped_mass": np.where(is_mapped, known_N - lost_N, 0.0),
        **{name: ours[name] for name in ("input_ids", "positions", "token_weights")},
    }
    entries = segment_sums(arrays["counts"].astype(np.int64), ours.lengths["position"])
    return FlatBatch(ours.ids, arrays, ours.lengths | {"entry": entries})


_SCORES = (
    *("observed_log_probs", "observed_ranks", "counts", "tail_mass"),
    *("topk_ids", "topk_log_probs"),
)


def mapped_sums(name: str, scores: FlatBatch) -> dict[str, float]:
    """The sums of what was mapped in a batch of the teacher `name`; none if none had to be."""
    if "mapping" not in scores.arrays:
        return {}
    lengths = scores.lengths["position"]
    of_row = scores["mapping"][(np.cumsum(lengths) - lengths)[lengths > 0]]
    sums = {
        "positions": np.count_nonzero(scores["mapping"] == MAPPED),
        "known_mass": scores["known_mass"].sum(),
        "mass": scores["mapped_mass"].sum(),
        "other_text": np.count_nonzero(of_row == OTHER_TEXT),
        "missing": np.count_nonzero(of_row == MISSING),
    }
    return {f"mapped.{name}.{what}": float(value) for what, value in sums.items()}


def mapped_shares(sums: Mapping[str, float], positions: int) -> list[Mapped]:
    """What was mapped of each teacher with another tokenizer, from the sums of a folder."""
    names = [key.split(".")[1] for key in sums if key.startswith("mapped.") and ".known" in key]
    shares = []
    for name in names:
        of = {key.split(".")[2]: sums[key] for key in sums if key.startswith(f"mapped.{name}.")}
        shares.append(
            Mapped(
                name,
                of["positions"] / max(positions, 1),
                of["mass"] / of["known_mass"] if of["known_mass"] else 0.0,
                int(of["other_text"]),
                int(of["missing"]),
            )
        )
    return shares
