"""What targets are made of: trust, scale and residual rules as pure array functions.

Each runs on numpy arrays (frozen, in build-targets) and on torch tensors (live, in the trainer)
from the same code and keeps the arrays' precision. Shapes: [...] is any shape of positions,
[..., S] a support of S ids at each, [..., V] the whole vocabulary. Log-probabilities are in nats.

Sources are in the table of `methods.py`, which names every rule.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

Array = Any  # of numpy or torch
Parameters = Mapping[str, Any]
TOP_ENTROPY_SIZE = 20  # tokens that eaft's entropy is taken over


@dataclass(frozen=True, slots=True)
class Signals:
    """What a rule may read at a set of positions, each [...]; None where nobody asked for it.

    The followed model is the student as it trains in the live form and the base prior in the frozen
    ones; y is the observed token.
    """

    log_prob: Array = None  # log p(y) of the followed model
    entropy: Array = None  # of the followed model, over the whole vocabulary
    top_entropy: Array = None  # of its 20 most probable tokens, renormalised among themselves
    sequence_log_ratio: Array = (
        None  # mean of log p(y) − log b(y) over the positions of the example
    )
    base_log_prob: Array = None  # log b(y)
    teacher_log_prob: Array = None  # log q(y)
    divergence: Array = None  # KL(teacher ‖ base)
    mask: Array = None  # in [0, 1], as it came with the demonstrations


Rule = Callable[[Signals, Parameters], Array]


def constant(value: Callable[[Parameters], float]) -> Rule:
    """The same number at every position, whatever signal is there to tell the shape."""

    def rule(signals: Signals, parameters: Parameters) -> Array:
        arrays = [getattr(signals, name) for name in signals.__dataclass_fields__]
        known = next(array for array in arrays if array is not None)
        return array_namespace(known).full_like(known, value(parameters))

    return rule


ONE = constant(lambda _: 1.0)


def likelihood(signals: Signals, _: Parameters) -> Array:
    """p_y."""
    return _exp(signals.log_prob)


def likelihood_power(signals: Signals, parameters: Parameters) -> Array:
    """p_y^alpha."""
    return _exp(parameters["alpha"] * signals.log_prob)


def likely(signals: Signals, parameters: Parameters) -> Array:
    """1 where p_y ≥ tau."""
    return _indicator(signals.log_prob, math.log(parameters["tau"]))


def entropy_power(signals: Signals, parameters: Parameters) -> Array:
    """(H₂₀/3)^a."""
    return (signals.top_entropy / 3.0) ** parameters["a"]


def sequence_weight(signals: Signals, parameters: Parameters) -> Array:
    """clamp(exp(T·mean_t(log p_y − log b_y)), 0, 16), the same at all positions of an example."""
    xp = array_namespace(signals.sequence_log_ratio)
    log_weight = parameters["T"] * signals.sequence_log_ratio
    return xp.exp(xp.clip(log_weight, None, math.log(16.0)))


def masked(signals: Signals, _: Parameters) -> Array:
    """What came with the demonstration."""
    return signals.mask


def anchored_trust(signals: Signals, parameters: Parameters) -> Array:
    """p_y/(p_y + lam)."""
    total = anchored_scale(signals, parameters)
    xp = array_namespace(total)
    return _exp(signals.log_prob) / xp.clip(total, xp.finfo(total.dtype).smallest_normal, None)


def anchored_scale(signals: Signals, parameters: Parameters) -> Array:
    """p_y + lam."""
    return _exp(signals.log_prob) + parameters["lam"]


def proximal_weight(signals: Signals, parameters: Parameters) -> Array:
    """r·1{r ≤ 1 + eps_hi}, r = p_y/b_y."""
    log_ratio = signals.log_prob - signals.base_log_prob
    xp = array_namespace(log_ratio)
    limit = math.log1p(parameters["eps_hi"])
    inside = log_ratio <= limit
    return xp.where(inside, xp.exp(xp.where(inside, log_ratio, 0.0)), 0.0)


def gift_trust(signals: Signals, parameters: Parameters) -> Array:
    """What softmax(log b + beta·δ_y) adds to y: b_y(e^beta − 1)/(1 + b_y(e^beta − 1))."""
    floored = array_namespace(signals.base_log_prob).clip(
        signals.base_log_prob, math.log(1e-10), None
    )
    beta = parameters["beta"]
    log_of_gain = beta + math.log(-math.expm1(-beta)) if beta > 0 else -math.inf  # e^beta − 1
    xp = array_namespace(floored)
    odds = xp.exp(xp.clip(floored + log_of_gain, None, 80.0))  # beyond, the trust is 1
    return odds / (1 + odds)


def flow_trust(signals: Signals, parameters: Parameters) -> Array:
    """b_y^(1/tau)."""
    return _exp(signals.base_log_prob / parameters["tau"])


def base_likely(signals: Signals, parameters: Parameters) -> Array:
    """1 where b_y ≥ tau."""
    return _indicator(signals.base_log_prob, math.log(parameters["tau"]))


def excess_loss(signals: Signals) -> Array:
    """By how much the base's loss exceeds the teacher's: log q_y − log b_y."""
    return signals.teacher_log_prob - signals.base_log_prob


def worth_learning(signals: Signals, parameters: Parameters) -> Array:
    """1 where the excess loss is threshold or more."""
    return _indicator(excess_loss(signals), parameters["threshold"])


def divergent(signals: Signals, parameters: Parameters) -> Array:
    """1 where KL(teacher ‖ base) ≥ beta."""
    return _indicator(signals.divergence, parameters["beta"])


def tempered_likelihood(signals: Signals, parameters: Parameters) -> Array:
    """p_y^g with g = clip(exp(−(log p_y + H)/beta), 0.1, 2)."""
    log_prob = signals.log_prob
    xp = array_namespace(log_prob)
    log_power = -(log_prob + signals.entropy) / parameters["beta"]
    return xp.exp(xp.exp(xp.clip(log_power, math.log(0.1), math.log(2.0))) * log_prob)


def trust_region(signals: Signals, parameters: Parameters) -> Array:
    """min(1, p_y/tau)."""
    xp = array_namespace(signals.log_prob)
    return xp.exp(xp.clip(signals.log_prob - math.log(parameters["tau"]), None, 0.0))


def geometric_mixture(
    log_probs: Array, log_tail: Array, other_log_probs: Array, other_log_tail: Array, eta: float
) -> tuple[Array, Array]:
    """∝ p^(1−η)·q^η on a support [..., S] and in the bucket outside of it [...], both as logs.

    Exact where the tails are empty. Else each tail counts as one outcome, and the gradient of a
    cross-entropy to the mixture is off by at most 2·m̂ in the sum of absolute values, m̂ being the
    mixture's own tail mass.
    """
    xp = array_namespace(log_probs)
    mixed = _scaled(log_probs, 1 - eta) + _scaled(other_log_probs, eta)
    mixed_tail = _scaled(log_tail, 1 - eta) + _scaled(other_log_tail, eta)
    log_norm = log_sum_exp(xp.concat([mixed, mixed_tail[..., None]], axis=-1))
    return mixed - log_norm[..., None], mixed_tail - log_norm


def contrast(expert_log_probs: Array, amateur_log_probs: Array, alpha: float) -> Array:
    """log of ∝ q_expert/q_amateur where q_expert ≥ alpha·max q_expert, −inf elsewhere, [..., S]."""
    xp = array_namespace(expert_log_probs)
    in_head = contrast_head(expert_log_probs, alpha)
    ratio = xp.where(in_head, expert_log_probs - amateur_log_probs, -math.inf)
    return ratio - log_sum_exp(ratio)[..., None]


def contrast_head(expert_log_probs: Array, alpha: float) -> Array:
    """Which ids of a support [..., S] have at least `alpha` times its highest probability."""
    xp = array_namespace(expert_log_probs)
    highest = xp.max(expert_log_probs, axis=-1)
    return expert_log_probs >= highest[..., None] + math.log(alpha)


def matching_gradient(log_probs: Array, is_observed: Array, beta: float, h: str) -> Array:
    """The gradient of gem with respect to the logits, a − (Σa)·δ_y, from log p [..., V].

    a is softmax(z/beta), for h "logsigmoid" times σ(0.01·(z − z_y)).
    """
    xp = array_namespace(log_probs)
    pull = matching_weights(log_probs, is_observed, beta, h)
    return pull - xp.where(is_observed, xp.sum(pull, axis=-1)[..., None], 0.0)


def matching_weights(log_probs: Array, is_observed: Array, beta: float, h: str) -> Array:
    """gem's a [..., V]: how hard each token is pushed down in favour of the observed one."""
    xp = array_namespace(log_probs)
    sharpened = (log_probs - xp.max(log_probs, axis=-1)[..., None]) / beta
    weights = xp.exp(sharpened - log_sum_exp(sharpened)[..., None])
    if h == "linear":
        return weights
    observed = xp.sum(xp.where(is_observed, log_probs, 0.0), axis=-1)[..., None]
    above = xp.where(weights > 0, log_probs - observed, 0.0)  # −∞ − (−∞) has no value
    return weights / (1 + xp.exp(xp.clip(-0.01 * above, None, 80.0)))


def entropy(log_probs: Array) -> Array:
    """−Σ p·log p over the last axis."""
    xp = array_namespace(log_probs)
    known = log_probs > -math.inf
    finite = xp.where(known, log_probs, 0.0)
    return -xp.sum(xp.where(known, xp.exp(finite) * finite, 0.0), axis=-1)


def renormalised_entropy(log_probs: Array) -> Array:
    """The entropy of the probabilities on the last axis, scaled to add up to 1."""
    return entropy(log_probs - log_sum_exp(log_probs)[..., None])


def divergence(log_probs: Array, other_log_probs: Array) -> Array:
    """KL(p ‖ q) over the last axis."""
    xp = array_namespace(log_probs)
    known = log_probs > -math.inf
    difference = xp.where(known, log_probs, 0.0) - xp.where(known, other_log_probs, 0.0)
    return xp.sum(xp.where(known, xp.exp(log_probs) * difference, 0.0), axis=-1)


def log_sum_exp(values: Array) -> Array:
    """log Σ exp over the last axis, −inf where all are."""
    xp = array_namespace(values)
    highest = xp.max(values, axis=-1)
    shift = xp.where(highest > -math.inf, highest, 0.0)
    total = xp.sum(xp.exp(values - shift[..., None]), axis=-1)
    return shift + xp.where(total > 0, xp.log(xp.where(total > 0, total, 1.0)), -math.inf)


def _scaled(log_probs: Array, power: float) -> Array:
    """power·log p, with p⁰ = 1 also where p is 0."""
    if power == 0:
        return array_namespace(log_probs).zeros_like(log_probs)
    return power * log_probs


def _indicator(values: Array, threshold: float) -> Array:
    """1 where a value is the threshold or more, else 0, in the values' own type."""
    return array_namespace(values).astype(values >= threshold, values.dtype)


def _exp(values: Array) -> Array:
    return array_namespace(values).exp(values)
