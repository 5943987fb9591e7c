"""Computes the targets of a batch from its scores.

N positions of a batch, V vocabulary. All values are float64 until they are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..format.batches import FlatBatch
from ..format.ragged import padded, segment_sums
from ..methods import rules
from ..methods.definition import Choice
from ..methods.rules import Signals
from .distributions import (
    SharedSupport,
    Supports,
    common_divergence,
    common_supports,
    concentration,
    contrasted,
    expected_rank,
    mass_up_to,
    mixture,
    most_probable_first,
    observed_only,
    truncated,
    within,
)
from .known import TopK, known_supports, top_k_of
from .pooling import Pooling, pooled
from .temperature import tempered
from .translation import mapped_sums

Floats = NDArray[np.float64]
SMALLEST_PROB = float(np.finfo(np.float32).smallest_normal)  # of stored probabilities


@dataclass(frozen=True, slots=True)
class Truncation:
    """The stored part of a distribution: a prefix of mass `top_p`, at most `max_support` ids."""

    top_p: float = 0.99
    max_support: int = 64


@dataclass(frozen=True, slots=True)
class ScoreModel:
    """The k and the vocabulary of a score folder, and the temperature to read it at."""

    top_k: int
    vocab_size: int
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Evidence:
    """The base and the teacher at the positions of a batch; of several teachers their mean."""

    scores: FlatBatch
    base_model: ScoreModel
    teacher_scores: FlatBatch | None = None
    teacher_model: ScoreModel | None = None
    more_teachers: tuple[tuple[FlatBatch, ScoreModel], ...] = ()
    pooling: Pooling | None = None  # with more teachers

    @property
    def observed_ids(self) -> NDArray[np.int32]:
        """The supervised tokens, [N]."""
        return self.scores.observed_ids

    @property
    def token_weights(self) -> Floats:
        """The token weights of the demonstrations, [N]."""
        return self.scores["token_weights"].astype(np.float64)

    @cached_property
    def plain_base_log_prob(self) -> Floats:
        """log b(y) at temperature 1, [N]."""
        return _observed_log_prob(self.scores)

    @cached_property
    def top_k(self) -> TopK:
        """The base's entries at temperature 1."""
        return top_k_of(self.scores)

    @property
    def plain_base(self) -> Supports:
        """The base at temperature 1."""
        return self.top_k.with_observed

    @cached_property
    def base_and_bound(self) -> tuple[Supports, Floats]:
        """The base at its temperature, and a bound of its error, [N]."""
        return _at_temperature(self.plain_base, self.base_model)

    @property
    def base(self) -> Supports:
        """The base at its temperature."""
        return self.base_and_bound[0]

    @cached_property
    def teacher_and_bound(self) -> tuple[Supports, Floats]:
        """The teacher at its temperature, and a bound of its error, [N]."""
        assert self.teacher_scores is not None
        assert self.teacher_model is not None
        teachers = [
            _at_temperature(known_supports(scores), model)
            for scores, model in ((self.teacher_scores, self.teacher_model), *self.more_teachers)
        ]
        supports, bound = teachers[0]
        if self.pooling is not None:
            supports = pooled([each for each, _ in teachers], self.pooling)
            # of the arithmetic mean; the geometric one is made at a temperature of 1
            bound = np.average([each for _, each in teachers], axis=0, weights=self.pooling.weights)
        return within(supports, self.base_model.vocab_size), bound

    @property
    def teacher(self) -> Supports:
        """The teacher at its temperature."""
        return self.teacher_and_bound[0]

    @cached_property
    def common(self) -> SharedSupport:
        """Base and teacher on their common ids."""
        return common_supports(self.base, self.teacher)

    def mixture(self, eta: float, alpha: float = 1.0) -> Supports:
        """The mixture of base and teacher on the common ids."""
        if (eta, alpha) not in self._mixtures:
            self._mixtures[eta, alpha] = mixture(self.common, eta, alpha)
        return self._mixtures[eta, alpha]

    @cached_property
    def _mixtures(self) -> dict[tuple[float, float], Supports]:
        return {}

    @cached_property
    def base_log_prob(self) -> Floats:
        """log b(y), [N]."""
        if self.base_model.temperature == 1:
            return self.plain_base_log_prob
        return _at_observed(self.base, self.observed_ids)

    @cached_property
    def teacher_log_prob(self) -> Floats:
        """log q(y), [N]."""
        assert self.teacher_scores is not None
        assert self.teacher_model is not None
        if self.teacher_model.temperature == 1 and self.pooling is None:
            return _observed_log_prob(self.teacher_scores)
        return _at_observed(self.teacher, self.observed_ids)

    def mapped_sums(self) -> dict[str, float]:
        """The sums of what was mapped of teachers with another tokenizer."""
        theirs = (self.teacher_scores, *(scores for scores, _ in self.more_teachers))
        sums: dict[str, float] = {}
        for number, scores in enumerate(theirs, 1):
            if scores is not None:
                name = "teacher" if number == 1 else f"teacher-{number}"
                sums |= mapped_sums(name, scores)
        return sums

    def signals(self, reads: frozenset[str]) -> Signals:
        """The signals that a rule reads, with the base as the followed model."""
        compute: dict[str, Callable[[], Floats]] = {
            "log_prob": lambda: self.base_log_prob,
            "entropy": self._entropy,
            "top_entropy": self._top_entropy,
            "concentration": lambda: concentration(self.base),
            "rank": lambda: self.scores["observed_ranks"].astype(np.float64),
            "expected_rank": lambda: expected_rank(self.base),
            "sequence_log_ratio": lambda: np.zeros_like(self.base_log_prob),
            "base_log_prob": lambda: self.base_log_prob,
            "base_mass": lambda: mass_up_to(self.base, self.observed_ids),
            "base_entropy": self._entropy,
            "teacher_log_prob": lambda: self.teacher_log_prob,
            "divergence": lambda: common_divergence(self.common),
            "mask": self._mask,
        }
        wanted = reads | {"log_prob"}
        for name in wanted - self._known_signals.keys():
            self._known_signals[name] = compute[name]()
        return Signals(**{name: self._known_signals[name] for name in wanted})

    @cached_property
    def _known_signals(self) -> dict[str, Floats]:
        return {}

    def _entropy(self) -> Floats:
        """A lower bound: the tail counts as one outcome."""
        log_probs_NS = padded(self.base.counts, self.base.log_probs, -np.inf)
        return rules.entropy(np.concatenate([log_probs_NS, self.base.log_tail[:, None]], axis=1))

    def _mask(self) -> Floats:
        """Raises UserError for token weights above 1."""
        too_much = self.token_weights > 1
        if too_much.any():
            raise UserError(
                f"example {_example_at(self.scores, too_much)}: a token has the weight "
                f"{self.token_weights[too_much][0]:g}, but a mask is 0 to 1: correct its weights"
            )
        return self.token_weights

    def _top_entropy(self) -> Floats:
        log_probs_NS = padded(self.base.counts, self.base.log_probs, -np.inf)
        return rules.renormalised_entropy(log_probs_NS[:, : rules.TOP_ENTROPY_SIZE])


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """The targets of a batch by one choice, not yet rounded."""

    choice: Choice
    trust: Floats  # [N] to store
    weights: Floats  # [N]
    residual: Supports


def targets_of(evidence: Evidence, choice: Choice, truncation: Truncation) -> Targets:
    """The targets of a batch.

    Trust and weight are 1 if the trainer computes them from the student.
    """
    if choice.reads_student:
        trust = np.ones(len(evidence.observed_ids))
        weights = trust
    else:
        trust, weights = choice.trust_and_weight(evidence.signals(choice.method.reads))
    if not choice.needs_mask:  # a mask is part of γ already
        weights = weights * evidence.token_weights
    return Targets(choice, trust, weights, stored_residual(evidence, choice, truncation))


def stored_residual(evidence: Evidence, choice: Choice, truncation: Truncation) -> Supports:
    """The distribution that a target folder stores, on its support."""
    observed = evidence.observed_ids
    match choice.stored:
        case "observed":
            return observed_only(observed, np.zeros(len(observed)))
        case "base-observed":
            log_prob = np.maximum(evidence.base_log_prob, np.log(SMALLEST_PROB))
            return observed_only(observed, log_prob)
        case "uniform":
            log_prob = -np.log(evidence.base_model.vocab_size)
            return observed_only(observed, np.full(len(observed), log_prob))
        case "base" if evidence.base_model.temperature == 1:
            return evidence.top_k.truncated(truncation.top_p, truncation.max_support)
        case "base":
            whole = evidence.base
        case "teacher":
            whole = evidence.teacher
        case "mixture":
            whole = most_probable_first(evidence.mixture(*choice.mixing))
        case "contrast":
            _refuse_unknown_head(evidence, choice.parameters["alpha"])
            whole = most_probable_first(contrasted(evidence.common, choice.parameters["alpha"]))
    return truncated(whole, observed, truncation.top_p, truncation.max_support)


def flat_targets(evidence: Evidence, targets: Targets) -> FlatBatch:
    """The targets as a batch to store."""
    scores, residual = evidence.scores, targets.residual
    arrays = {
        "input_ids": scores["input_ids"],
        "positions": scores["positions"],
        "trust": targets.trust.astype(np.float32),
        "counts": residual.counts.astype(np.int32),
        "support_ids": residual.ids.astype(np.int32, copy=False),
        "support_probs": residual.probs.astype(np.float32),
        "tail_mass": residual.tail_mass.astype(np.float32),
        "weights": targets.weights.astype(np.float32),
    }
    entries = segment_sums(residual.counts, scores.lengths["position"])
    return FlatBatch(scores.ids, arrays, scores.lengths | {"entry": entries})


def _refuse_unknown_head(evidence: Evidence, alpha: float) -> None:
    """Raise UserError if the base's probability is unknown at an id of the teacher's head."""
    teacher, common = evidence.teacher, evidence.common.second
    size = len(teacher.counts)
    starts = np.cumsum(teacher.counts) - teacher.counts
    lowest = np.maximum.reduceat(teacher.log_probs, starts) + np.log(alpha) if size else np.zeros(0)
    in_head = teacher.log_probs >= lowest[teacher.position_of]
    in_common = common.log_probs >= lowest[common.position_of]
    wanted = np.bincount(teacher.position_of[in_head], minlength=size)
    known = np.bincount(common.position_of[in_common], minlength=size)
    if (wanted > known).any():
        raise UserError(
            f"example {_example_at(evidence.scores, wanted > known)}: the base's probability of a "
            "token that is likely under the teacher is unknown: score the base with `qpipe score "
            "--at` the teacher's folder, and build from that"
        )


def _example_at(scores: FlatBatch, at_N: NDArray[np.bool_]) -> str:
    """The id of the first example with a position at which `at_N` is true."""
    ends = np.cumsum(scores.lengths["position"])
    return scores.ids[int(np.searchsorted(ends, np.argmax(at_N), side="right"))]


def _at_temperature(supports: Supports, model: ScoreModel) -> tuple[Supports, Floats]:
    if model.temperature == 1:
        return supports, np.zeros(len(supports.counts))
    return tempered(supports, model.temperature, model.top_k, model.vocab_size)


def _observed_log_prob(scores: FlatBatch) -> Floats:
    log_prob = scores["observed_log_probs"].astype(np.float64)
    return np.minimum(log_prob, 0)  # rounding may exceed it


def _at_observed(supports: Supports, observed: NDArray[np.int32]) -> Floats:
    is_observed = supports.ids == observed[supports.position_of]
    return np.minimum(supports.log_probs[is_observed], 0)
