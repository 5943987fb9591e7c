"""Divergences of the student p from the teacher q, as losses of their own.

Each is L = Σ_k F(p_k, q_k) over outcomes: all ids, or the ids of a support and its tail as one. The
gradient with respect to the logits is w_k − p_k·Σw with w_k = p_k·∂L/∂p_k, up to a multiple of p_k,
which cancels. The target that the loss steers towards is Q = p − gradient. Q adds up to 1, but it
may have negative entries.

On a support the gradient gives the tail the student's own shape. Its distance from the gradient of
the whole teacher, in the sum of absolute values, is bounded as follows. Let u(r) = w_k/p_k with r =
q_k/p_k; u falls with r. The difference at an id of the tail is p_j·(e_j − ē) with e_j = u(r_j) −
u(r_tail) and ē = Σ_tail p_j·e_j, elsewhere −p_k·ē. As these add up to 0, the distance is twice the
sum of the positive ones, and of the negative ones.

- If u is convex, ē ≥ 0, and the positive ones add up to p_tail·(u(0) − u(r_tail)) at most.
- If the slope of u is at most c, the positive ones for ē ≥ 0 and the negative ones for ē < 0 add up
  to c·q_tail at most.

`table` names the source of every divergence. Shapes: [..., E] E outcomes, [...] positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

Array = Any  # of numpy or torch
Parameters = Mapping[str, Any]
LOG_LEAST = -126 * math.log(2)  # of float32: the least log q in a KL(p ‖ q), else infinite

# the terms F and the pulls w, from log p, log q
_Parts = Callable[[Array, Array, Parameters], tuple[Array, Array]]
_Half = Callable[[Array, Array, Parameters], Array]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence, its formula, and half the bound of its gradient's error by a tail."""

    formula: str
    parts: _Parts
    half_bound: _Half

    def __call__(
        self, log_probs: Array, teacher_log_probs: Array, parameters: Parameters
    ) -> tuple[Array, Array]:
        """The divergence [...] and its target Q [..., E]."""
        xp = array_namespace(log_probs)
        terms, pulls = self.parts(log_probs, teacher_log_probs, parameters)
        total = xp.sum(pulls, axis=-1)[..., None]
        return xp.sum(terms, axis=-1), xp.exp(log_probs) * (1 + total) - pulls

    def bound(self, log_tail: Array, teacher_log_tail: Array, parameters: Parameters) -> Array:
        """A bound of ‖ĝ − g‖₁ by the tails' masses, [...]; 0 without a tail."""
        return 2 * self.half_bound(log_tail, teacher_log_tail, parameters)


def _convex(formula: str) -> Callable[[_Parts], Divergence]:
    """A divergence whose u is convex: its bound follows from the pulls of the tail."""

    def made(parts: _Parts) -> Divergence:
        def half_bound(log_p: Array, log_q: Array, parameters: Parameters) -> Array:
            xp = array_namespace(log_p)
            nothing = xp.full_like(log_q, -math.inf)
            return parts(log_p, nothing, parameters)[1] - parts(log_p, log_q, parameters)[1]

        return Divergence(formula, parts, half_bound)

    return made


@_convex("KL(p,q)")
def reverse_kl(log_p: Array, log_q: Array, _: Parameters) -> tuple[Array, Array]:
    xp = array_namespace(log_p)
    terms = _times_log_ratio(log_p, log_p, xp.clip(log_q, LOG_LEAST, None))
    return terms, terms


@_convex("(1-lam) KL(q,p) + lam KL(p,q)")
def mixed_kl(log_p: Array, log_q: Array, parameters: Parameters) -> tuple[Array, Array]:
    lam = parameters["lam"]
    there, its_pulls = _forward_kl(log_p, log_q)
    back, its_own = reverse_kl.parts(log_p, log_q, parameters)
    return (1 - lam) * there + lam * back, (1 - lam) * its_pulls + lam * its_own


@_convex("beta KL(q,m) + (1-beta) KL(p,m), m = beta q + (1-beta) p")
def jensen_shannon(log_p: Array, log_q: Array, parameters: Parameters) -> tuple[Array, Array]:
    """At a beta of 0 and of 1 the limits of it divided by beta and by 1 − beta."""
    beta = parameters["beta"]
    if beta == 0:
        return _forward_kl(log_p, log_q)
    if beta == 1:
        return reverse_kl.parts(log_p, log_q, parameters)
    log_m = _log_mixture(log_q, log_p, beta)
    pulls = (1 - beta) * _times_log_ratio(log_p, log_p, log_m)
    return beta * _times_log_ratio(log_q, log_q, log_m) + pulls, pulls


@_convex("KL(q, alpha q + (1-alpha) p)")
def skew_kl(log_p: Array, log_q: Array, parameters: Parameters) -> tuple[Array, Array]:
    xp, alpha = array_namespace(log_p), parameters["alpha"]
    log_m = _log_mixture(log_q, log_p, alpha)
    # q·p/m, as a power of e: each factor alone may be 0
    shared = xp.where(log_m > -math.inf, log_q + log_p - log_m, -math.inf)
    return _times_log_ratio(log_q, log_q, log_m), -(1 - alpha) * xp.exp(shared)


def _skew_reverse_parts(log_p: Array, log_q: Array, parameters: Parameters) -> tuple[Array, Array]:
    xp, alpha = array_namespace(log_p), parameters["alpha"]
    log_m = _log_mixture(log_p, log_q, alpha)
    terms = _times_log_ratio(log_p, log_p, log_m)
    squared = xp.where(log_m > -math.inf, 2 * log_p - log_m, -math.inf)
    return terms, terms - alpha * xp.exp(squared)


def _of_slope(_: Array, log_q: Array, parameters: Parameters) -> Array:
    """u = −log(alpha + (1−alpha)·r) − alpha/(alpha + (1−alpha)·r) has this slope at most."""
    alpha = parameters["alpha"]
    return (1 - alpha) / (4 * alpha) * array_namespace(log_q).exp(log_q)


skew_reverse_kl = Divergence(
    "KL(p, alpha p + (1-alpha) q)", parts=_skew_reverse_parts, half_bound=_of_slope
)


def _forward_kl(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    return _times_log_ratio(log_q, log_q, log_p), -array_namespace(log_q).exp(log_q)


def _log_mixture(log_one: Array, log_other: Array, share: float) -> Array:
    """log of share·one + (1−share)·other."""
    xp = array_namespace(log_one)
    return xp.logaddexp(log_one + math.log(share), log_other + math.log1p(-share))


def _times_log_ratio(log_probs: Array, log_one: Array, log_other: Array) -> Array:
    """p·(log one − log other), 0 where p is 0."""
    xp = array_namespace(log_probs)
    known = log_probs > -math.inf
    ratio = xp.where(known, log_one, 0.0) - xp.where(known, log_other, 0.0)
    return xp.where(known, xp.exp(log_probs) * ratio, 0.0)
