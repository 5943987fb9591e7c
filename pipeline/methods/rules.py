"""Trust and scale rules, and the distributions that residuals are made of, as array functions.

They run on numpy arrays (frozen forms, in build-targets) and on torch tensors (live forms, in the
trainer) and keep the precision of the arrays. Shapes: [...] any shape of positions, [..., S] a
support of S ids at each, [..., V] the whole vocabulary. Log-probabilities are in nats.

`table` names the source of every rule.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

Array = Any  # of numpy or torch
Parameters = Mapping[str, Any]
TOP_ENTROPY_SIZE = 20  # tokens over which eaft takes the entropy


@dataclass(frozen=True, slots=True)
class Signals:
    """The inputs of rules at a set of positions, [...] each; None if no rule reads it.

    The followed model is the student in training for the live form, the base for frozen forms. y is
    the observed token.
    """

    log_prob: Array = None  # log p(y) of the followed model
    entropy: Array = None  # of the followed model, over the whole vocabulary
    top_entropy: Array = None  # of its 20 most probable tokens, renormalised
    concentration: Array = None  # Σ p² of the followed model
    rank: Array = None  # ids to which the followed model gives at least p(y)
    expected_rank: Array = None  # the mean rank of an id drawn from the followed model
    sequence_log_ratio: Array = None  # mean of log p(y) − log b(y) over an example's positions
    base_log_prob: Array = None  # log b(y)
    base_mass: Array = None  # b(y) and the mass of all ids less probable under the base
    base_entropy: Array = None
    teacher_log_prob: Array = None  # log q(y)
    divergence: Array = None  # KL(teacher ‖ base)
    mask: Array = None  # in [0, 1], from the demonstrations


_Function = Callable[[Signals, Parameters], Array]


@dataclass(frozen=True, slots=True)
class Rule:
    """A value [...] computed from signals and parameters, its formula, and the signals it reads."""

    formula: str
    reads: frozenset[str]
    function: _Function

    def __call__(self, signals: Signals, parameters: Parameters) -> Array:
        return self.function(signals, parameters)


def _rule(formula: str, *reads: str) -> Callable[[_Function], Rule]:
    return lambda function: Rule(formula, frozenset(reads), function)


def constant(formula: str, value: Callable[[Parameters], float]) -> Rule:
    """The same number at every position; any signal gives the shape."""

    def rule(signals: Signals, parameters: Parameters) -> Array:
        arrays = [getattr(signals, name) for name in signals.__dataclass_fields__]
        known = next(array for array in arrays if array is not None)
        return array_namespace(known).full_like(known, value(parameters))

    return Rule(formula, frozenset(), rule)


ZERO = constant("0", lambda _: 0.0)
ONE = constant("1", lambda _: 1.0)


@_rule("p_y", "log_prob")
def likelihood(signals: Signals, _: Parameters) -> Array:
    return _exp(signals.log_prob)


@_rule("p_y^alpha", "log_prob")
def likelihood_power(signals: Signals, parameters: Parameters) -> Array:
    return _exp(parameters["alpha"] * signals.log_prob)


@_rule("1 if p_y >= tau, else 0", "log_prob")
def likely(signals: Signals, parameters: Parameters) -> Array:
    return _indicator(signals.log_prob, math.log(parameters["tau"]))


@_rule("(H_20/3)^a", "top_entropy")
def entropy_power(signals: Signals, parameters: Parameters) -> Array:
    return (signals.top_entropy / 3.0) ** parameters["a"]


@_rule("min(16, exp(T mean_t log(p_y/b_y)))", "sequence_log_ratio")
def sequence_weight(signals: Signals, parameters: Parameters) -> Array:
    xp = array_namespace(signals.sequence_log_ratio)
    log_weight = parameters["T"] * signals.sequence_log_ratio
    return xp.exp(xp.clip(log_weight, None, math.log(16.0)))


@_rule("mask", "mask")
def masked(signals: Signals, _: Parameters) -> Array:
    return signals.mask


@_rule("p_y+lam", "log_prob")
def anchored_scale(signals: Signals, parameters: Parameters) -> Array:
    return _exp(signals.log_prob) + parameters["lam"]


@_rule("p_y/(p_y+lam)", "log_prob")
def anchored_trust(signals: Signals, parameters: Parameters) -> Array:
    total = anchored_scale(signals, parameters)
    xp = array_namespace(total)
    return _exp(signals.log_prob) / xp.clip(total, xp.finfo(total.dtype).smallest_normal, None)


@_rule("r if r <= 1+eps_hi, else 0; r = p_y/b_y", "log_prob", "base_log_prob")
def proximal_weight(signals: Signals, parameters: Parameters) -> Array:
    log_ratio = signals.log_prob - signals.base_log_prob
    xp = array_namespace(log_ratio)
    limit = math.log1p(parameters["eps_hi"])
    inside = log_ratio <= limit
    return xp.where(inside, xp.exp(xp.where(inside, log_ratio, 0.0)), 0.0)


@_rule("b_y(e^beta-1)/(1+b_y(e^beta-1))", "base_log_prob")
def gift_trust(signals: Signals, parameters: Parameters) -> Array:
    """The share that softmax(log b + beta·δ_y) adds to y."""
    floored = array_namespace(signals.base_log_prob).clip(
        signals.base_log_prob, math.log(1e-10), None
    )
    beta = parameters["beta"]
    log_of_gain = beta + math.log(-math.expm1(-beta)) if beta > 0 else -math.inf  # e^beta − 1
    xp = array_namespace(floored)
    odds = xp.exp(xp.clip(floored + log_of_gain, None, 80.0))  # beyond, the trust is 1
    return odds / (1 + odds)


@_rule("-log b_y", "base_log_prob")
def base_loss(signals: Signals, _: Parameters) -> Array:
    return -signals.base_log_prob


@_rule("b_y^(1/tau)", "base_log_prob")
def flow_trust(signals: Signals, parameters: Parameters) -> Array:
    return _exp(signals.base_log_prob / parameters["tau"])


@_rule("1 if b_y >= tau, else 0", "base_log_prob")
def base_likely(signals: Signals, parameters: Parameters) -> Array:
    return _indicator(signals.base_log_prob, math.log(parameters["tau"]))


@_rule("log(q_y/b_y)", "base_log_prob", "teacher_log_prob")
def excess_loss(signals: Signals, _: Parameters) -> Array:
    return signals.teacher_log_prob - signals.base_log_prob


@_rule("1 if log(q_y/b_y) >= threshold, else 0", "base_log_prob", "teacher_log_prob")
def worth_learning(signals: Signals, parameters: Parameters) -> Array:
    return _indicator(excess_loss(signals, parameters), parameters["threshold"])


@_rule("1 if KL(q,b) >= beta, else 0", "divergence")
def divergent(signals: Signals, parameters: Parameters) -> Array:
    return _indicator(signals.divergence, parameters["beta"])


@_rule("p_y^clip(exp(-(log p_y+H)/beta), 0.1, 2)", "log_prob", "entropy")
def tempered_likelihood(signals: Signals, parameters: Parameters) -> Array:
    log_prob = signals.log_prob
    xp = array_namespace(log_prob)
    log_power = -(log_prob + signals.entropy) / parameters["beta"]
    return xp.exp(xp.exp(xp.clip(log_power, math.log(0.1), math.log(2.0))) * log_prob)


@_rule("min(1, p_y/tau)", "log_prob")
def trust_region(signals: Signals, parameters: Parameters) -> Array:
    xp = array_namespace(signals.log_prob)
    return xp.exp(xp.clip(signals.log_prob - math.log(parameters["tau"]), None, 0.0))


@_rule("p_y^(sum p^2)", "log_prob", "concentration")
def focused_likelihood(signals: Signals, _: Parameters) -> Array:
    return _exp(signals.concentration * signals.log_prob)


@_rule("max(p_y^(1/tau), floor)", "log_prob")
def floored_likelihood(signals: Signals, parameters: Parameters) -> Array:
    xp = array_namespace(signals.log_prob)
    return xp.clip(_exp(signals.log_prob / parameters["tau"]), parameters["floor"], None)


@_rule("p_y max(0, 1 - logit(p_y)/logit(P))", "log_prob")
def information(signals: Signals, parameters: Parameters) -> Array:
    xp = array_namespace(signals.log_prob)
    log_prob = xp.clip(signals.log_prob, -1e4, None)  # 0 times a finite number
    log_rest = xp.log(xp.clip(-xp.expm1(log_prob), xp.finfo(log_prob.dtype).smallest_normal, None))
    at_end = math.log(parameters["P"]) - math.log1p(-parameters["P"])
    return xp.exp(log_prob) * xp.clip(1 - (log_prob - log_rest) / at_end, 0.0, None)


@_rule("p_y^power 2^(f(E[R])-f(R)), f(x) = 1/log2(1+x)", "log_prob", "rank", "expected_rank")
def relative_scale(signals: Signals, parameters: Parameters) -> Array:
    xp = array_namespace(signals.rank)
    decay = 1 / xp.log2(1 + signals.expected_rank) - 1 / xp.log2(1 + signals.rank)
    return xp.exp(_scaled(signals.log_prob, parameters["power"]) + math.log(2) * decay)


@_rule("b_y", "base_log_prob")
def base_likelihood(signals: Signals, _: Parameters) -> Array:
    return _exp(signals.base_log_prob)


@_rule("1 if b_y + (sum of all b_k < b_y) >= tau, else 0", "base_mass")
def supported(signals: Signals, parameters: Parameters) -> Array:
    return _indicator(signals.base_mass, parameters["tau"])


@_rule("H(b)", "base_entropy")
def base_uncertainty(signals: Signals, _: Parameters) -> Array:
    return signals.base_entropy


@_rule("1 if H(b) >= threshold, else 0", "base_entropy")
def uncertain(signals: Signals, parameters: Parameters) -> Array:
    return _indicator(signals.base_entropy, parameters["threshold"])


@_rule("H(b) + KL(q,b)", "base_entropy", "divergence")
def importance(signals: Signals, _: Parameters) -> Array:
    xp = array_namespace(signals.divergence)
    return xp.clip(signals.base_entropy + signals.divergence, None, 1e6)


@_rule("1 if H(b) + KL(q,b) >= threshold, else 0", "base_entropy", "divergence")
def important(signals: Signals, parameters: Parameters) -> Array:
    return _indicator(importance(signals, parameters), parameters["threshold"])


def mixture(
    log_probs: Array,
    log_tail: Array,
    other_log_probs: Array,
    other_log_tail: Array,
    eta: float,
    alpha: float = 1.0,
) -> tuple[Array, Array]:
    """log of ∝ ((1−η)·p^a + η·q^a)^(1/a), a = (1−α)/2, on a support [..., S] and in its tail [...].

    It is the arithmetic mixture at an α of −1, and the geometric one, ∝ p^(1−η)·q^η, at 1. Exact if
    the tails are empty. Otherwise each tail counts as one outcome. For α ≥ −1 the mean of two sums
    is at least the sum of the means, so the tail mass m̂ of the mixture is at least the true one,
    and the gradient of a cross-entropy to it is off by at most 2·m̂ in the sum of absolute values.
    """
    xp = array_namespace(log_probs)
    mixed = _log_mean(log_probs, other_log_probs, eta, alpha)
    mixed_tail = _log_mean(log_tail, other_log_tail, eta, alpha)
    log_norm = log_sum_exp(xp.concat([mixed, mixed_tail[..., None]], axis=-1))
    return mixed - log_norm[..., None], mixed_tail - log_norm


def contrast(expert_log_probs: Array, amateur_log_probs: Array, alpha: float) -> Array:
    """log of ∝ q_expert/q_amateur where q_expert ≥ alpha·max q_expert, −inf elsewhere, [..., S]."""
    xp = array_namespace(expert_log_probs)
    in_head = contrast_head(expert_log_probs, alpha)
    ratio = xp.where(in_head, expert_log_probs - amateur_log_probs, -math.inf)
    return ratio - log_sum_exp(ratio)[..., None]


def contrast_head(expert_log_probs: Array, alpha: float) -> Array:
    """True for ids of a support [..., S] with at least `alpha` times its highest probability."""
    xp = array_namespace(expert_log_probs)
    highest = xp.max(expert_log_probs, axis=-1)
    return expert_log_probs >= highest[..., None] + math.log(alpha)


def matching_gradient(log_probs: Array, is_observed: Array, beta: float, h: str) -> Array:
    """The gradient of gem with respect to the logits, a − (Σa)·δ_y, from log p [..., V].

    a is softmax(z/beta); for h "logsigmoid" it is multiplied by σ(0.01·(z − z_y)).
    """
    xp = array_namespace(log_probs)
    pull = matching_weights(log_probs, is_observed, beta, h)
    return pull - xp.where(is_observed, xp.sum(pull, axis=-1)[..., None], 0.0)


def matching_weights(log_probs: Array, is_observed: Array, beta: float, h: str) -> Array:
    """gem's a [..., V]: the weight that each token loses to the observed token."""
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


def concentration(log_probs: Array) -> Array:
    """Σ p² over the last axis."""
    xp = array_namespace(log_probs)
    return xp.sum(xp.exp(2 * log_probs), axis=-1)


def rank(log_probs: Array, observed_log_prob: Array) -> Array:
    """The number of ids on the last axis that are at least as probable as the observed one."""
    xp = array_namespace(log_probs)
    at_least = log_probs >= observed_log_prob[..., None]
    return xp.sum(xp.astype(at_least, log_probs.dtype), axis=-1)


def expected_rank(log_probs: Array) -> Array:
    """Σ r·p of the r-th most probable id over the last axis; ranks begin at 1."""
    xp = array_namespace(log_probs)
    probs = xp.exp(xp.sort(log_probs, axis=-1, descending=True))
    return xp.sum(probs * xp.cumulative_sum(xp.ones_like(probs), axis=-1), axis=-1)


def mass_up_to(log_probs: Array, observed_log_prob: Array) -> Array:
    """The probability of the observed id and of all less probable ones on the last axis."""
    xp = array_namespace(log_probs)
    lower = log_probs < observed_log_prob[..., None]
    return xp.exp(observed_log_prob) + xp.sum(xp.where(lower, xp.exp(log_probs), 0.0), axis=-1)


def divergence(log_probs: Array, other_log_probs: Array) -> Array:
    """KL(p ‖ q) over the last axis."""
    xp = array_namespace(log_probs)
    known = log_probs > -math.inf
    difference = xp.where(known, log_probs, 0.0) - xp.where(known, other_log_probs, 0.0)
    return xp.sum(xp.where(known, xp.exp(log_probs) * difference, 0.0), axis=-1)


def log_sum_exp(values: Array) -> Array:
    """log Σ exp over the last axis; −inf if all values are."""
    xp = array_namespace(values)
    highest = xp.max(values, axis=-1)
    shift = xp.where(highest > -math.inf, highest, 0.0)
    total = xp.sum(xp.exp(values - shift[..., None]), axis=-1)
    return shift + xp.where(total > 0, xp.log(xp.where(total > 0, total, 1.0)), -math.inf)


def _log_mean(log_one: Array, log_other: Array, eta: float, alpha: float) -> Array:
    """The log of the power mean of two probabilities, with weights 1 − η and η."""
    if alpha == 1 or eta in (0, 1):
        return _scaled(log_one, 1 - eta) + _scaled(log_other, eta)
    xp, power = array_namespace(log_one), (1 - alpha) / 2
    known = (log_one > -math.inf) | (log_other > -math.inf)
    rise = power * (xp.where(known, log_other, 0.0) - xp.where(known, log_one, 0.0))
    near = log_one + xp.log1p(eta * xp.expm1(xp.clip(rise, -1.0, 1.0))) / power
    terms = (math.log1p(-eta) + power * log_one, math.log(eta) + power * log_other)
    # the second form would cancel at a small power
    return xp.where(xp.abs(rise) < 1, near, xp.logaddexp(*terms) / power)


def _scaled(log_probs: Array, power: float) -> Array:
    """power·log p, with p⁰ = 1 also for p = 0."""
    if power == 0:
        return array_namespace(log_probs).zeros_like(log_probs)
    return power * log_probs


def _indicator(values: Array, threshold: float) -> Array:
    """1 for values ≥ threshold, else 0, in the type of the values."""
    return array_namespace(values).astype(values >= threshold, values.dtype)


def _exp(values: Array) -> Array:
    return array_namespace(values).exp(values)
