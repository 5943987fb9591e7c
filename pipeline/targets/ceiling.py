"""The ceiling of targets: the behaviour of a model that has learnt them perfectly.

A target may give the observed token so little that training cannot teach it. Mean −log Q(y) is the
loss that such a model keeps; the share of tokens with argmax Q = y is the part of a demonstration
that it would write itself. Neither needs a training run. For a method that reads the student, Q is
the target at the start, when the student equals the base; for a divergence it is the teacher, at
which training ends.

N positions. Sums are kept over a folder, in all and by b(y), so that shares and means do not depend
on the sharding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..format.batches import FlatBatch
from ..format.ragged import segment_sums
from ..methods.definition import Choice
from ..methods.rules import TOP_ENTROPY_SIZE
from .build import Evidence, Floats, ScoreModel
from .distributions import (
    SMALLEST_TAIL,
    SharedSupport,
    Supports,
    common_supports,
    contrasted,
    observed_only,
    safe_log,
    uniform_on,
)

BUCKETS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)  # of b(y)
SMALL_TRUST = 0.05
SMALLEST_TARGET = 1e-10  # the least Q(y) that counts; 0 would make the mean infinite


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Means over supervised tokens; `name` is a bucket of b(y), or "all"."""

    name: str
    positions: int
    nll: float  # mean −log Q(y) in nats
    learnable: float  # share of tokens with argmax Q = y
    starved: float  # share of tokens with γ < 0.05
    divergence: float  # mean KL(Q ‖ base) in nats, a lower bound: tails count as one outcome


def has_ceiling(choice: Choice, base: ScoreModel) -> bool:
    """Whether the target at the start is a distribution that the scores determine."""
    needed = {"top_entropy": min(TOP_ENTROPY_SIZE, base.vocab_size), "entropy": base.vocab_size}
    enough = all(base.top_k >= needed.get(name, 0) for name in choice.method.reads)
    return choice.residual != "gem" and enough


def ceiling_sums(evidence: Evidence, choice: Choice, residual: Supports) -> dict[str, float]:
    """The sums of a batch for the ceiling; `residual` is the stored one."""
    if not has_ceiling(choice, evidence.base_model):
        return {}
    trust, _ = choice.trust_and_scale(evidence.signals(choice.method.reads))
    is_one_hot = choice.is_weight and not choice.reads_student
    target_trust = np.ones_like(trust) if is_one_hot else trust
    support = _residual_at_start(evidence, choice, residual)
    log_target, is_mode = _observed_target(evidence, choice, target_trust, support)
    divergence = _divergence_from_base(evidence, choice, target_trust, support)
    values = {
        "positions": np.ones(len(trust)),
        "nll": -log_target,
        "learnable": is_mode.astype(np.float64),
        "starved": (trust < SMALL_TRUST).astype(np.float64),
        "divergence": divergence,
    }
    bucket_N = np.digitize(np.exp(evidence.plain_base_log_prob), BUCKETS[1:-1])
    sums = {
        f"ceiling.{name}.{bucket}": float(total)
        for name, value in values.items()
        for bucket, total in enumerate(np.bincount(bucket_N, value, len(BUCKETS) - 1))
    }
    return sums | {"ceiling.reproducible": _reproducible(evidence.scores, is_mode)}


def ceilings(sums: Mapping[str, float]) -> list[Ceiling]:
    """The ceiling overall, then by bucket; empty if the method has none."""
    if "ceiling.reproducible" not in sums:
        return []
    rows = [_ceiling(_bucket_name(bucket), [bucket], sums) for bucket in range(len(BUCKETS) - 1)]
    return [_ceiling("all", range(len(BUCKETS) - 1), sums), *rows]


def reproducible_share(sums: Mapping[str, float], demonstrations: int) -> float:
    """The share of demonstrations that greedy decoding of the targets reproduces."""
    return sums["ceiling.reproducible"] / max(demonstrations, 1)


def can_teach(overall: Ceiling, reproducible: float) -> bool:
    """Whether two thirds of the tokens and half of the demonstrations can be learnt."""
    return overall.learnable >= 2 / 3 and reproducible >= 1 / 2


def ceiling_advice(overall: Ceiling, reproducible: float) -> str:
    """A warning if a third of the tokens or most demonstrations cannot be learnt, else ""."""
    if can_teach(overall, reproducible):
        return ""
    return (
        f"another token than the observed one is the target's mode at {1 - overall.learnable:.0%} "
        f"of the tokens, and {1 - reproducible:.0%} of the demonstrations cannot be learnt whole: "
        "any method whose γ is above 0.5 always can, as --method sft+kl with its own lam"
    )


def _ceiling(name: str, buckets: Any, sums: Mapping[str, float]) -> Ceiling:
    total = {
        value: sum(sums[f"ceiling.{value}.{bucket}"] for bucket in buckets)
        for value in ("positions", "nll", "learnable", "starved", "divergence")
    }
    positions = total.pop("positions")
    return Ceiling(
        name, int(positions), **{key: value / max(positions, 1) for key, value in total.items()}
    )


def _bucket_name(bucket: int) -> str:
    return f"{BUCKETS[bucket]:g} to {BUCKETS[bucket + 1]:g}"


def _residual_at_start(evidence: Evidence, choice: Choice, residual: Supports) -> Supports:
    """π̃ when the student equals the base."""
    if choice.residual == "student" and choice.reads_student:
        return evidence.base
    if choice.residual in ("observed", "student"):
        observed = evidence.observed_ids
        return observed_only(observed, np.zeros(len(observed)))
    if choice.residual == "mixture" and choice.form == "live":
        return evidence.mixture(*choice.mixing)
    return residual


def _observed_target(
    evidence: Evidence, choice: Choice, trust: Floats, residual: Supports
) -> tuple[Floats, NDArray[np.bool_]]:
    """log Q(y), and whether y is the only mode of Q, [N] each."""
    place = residual.places_of(evidence.observed_ids)
    observed = np.zeros(len(trust))
    observed[residual.positions_of(place)] = residual.probs[place]
    others = residual.probs.copy()
    others[place] = 0.0
    starts = np.cumsum(residual.counts) - residual.counts
    highest = np.maximum.reduceat(others, starts) if len(starts) else np.zeros(0)
    if choice.residual == "uniform":
        highest = residual.tail_mass / (evidence.base_model.vocab_size - 1)
    target = trust + (1 - trust) * observed
    return np.log(np.maximum(target, SMALLEST_TARGET)), target > (1 - trust) * highest


def _divergence_from_base(
    evidence: Evidence, choice: Choice, trust: Floats, residual: Supports
) -> Floats:
    """KL(Q ‖ base), [N]: exact if the residual is the base or absent, else a lower bound."""
    log_base = evidence.plain_base_log_prob
    if choice.residual == "observed" or (trust == 1).all():
        return -log_base
    if choice.residual in ("base", "student") and evidence.base_model.temperature == 1:
        target = trust + (1 - trust) * np.exp(log_base)
        log_share = safe_log(1 - trust, 0.0)  # Q(z)/b(z) for every other token z
        return target * (safe_log(target, 0.0) - log_base) + (1 - target) * log_share
    base, on_common = _base_and_residual(evidence, choice, residual)
    is_observed = base.ids == evidence.observed_ids[base.position_of]
    trust_K = trust[base.position_of]
    target = np.where(is_observed, trust_K, 0.0) + (1 - trust_K) * on_common.probs
    inner = target * (safe_log(target, 0.0) - base.log_probs)
    tail = (1 - trust) * on_common.tail_mass
    base_tail = np.maximum(base.tail_mass, SMALLEST_TAIL)
    return segment_sums(inner, base.counts) + tail * (safe_log(tail, 0.0) - np.log(base_tail))


def _base_and_residual(evidence: Evidence, choice: Choice, residual: Supports) -> SharedSupport:
    """The base and π̃ on their common ids."""
    if choice.residual == "uniform":
        return SharedSupport(
            evidence.plain_base, uniform_on(evidence.plain_base, evidence.base_model.vocab_size)
        )
    if evidence.base_model.temperature == 1 and choice.needs_teacher:
        match choice.residual:
            case "teacher":
                return evidence.common
            case "mixture":
                return evidence.common._replace(second=evidence.mixture(*choice.mixing))
            case "contrast":
                contrast = contrasted(evidence.common, choice.parameters["alpha"])
                return evidence.common._replace(second=contrast)
            case _:
                pass
    return common_supports(evidence.plain_base, residual)


def _reproducible(scores: FlatBatch, is_mode: NDArray[np.bool_]) -> float:
    """The number of demonstrations that greedy decoding of their targets reproduces."""
    missed = segment_sums((~is_mode).astype(np.int64), scores.lengths["position"])
    return float((missed == 0).sum())
