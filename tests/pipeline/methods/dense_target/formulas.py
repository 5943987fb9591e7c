"""Dense targets as methods.md has them, position by position in plain float64."""

import math
from dataclasses import replace

import numpy as np
from qpipe.tests.support import divergences
from qpipe.tests.support.methods import (
    DEFAULTS,
    DIVERGENCES,
    FORMULAS,
    Parameters,
    Token,
    base_entropy,
    importance,
    log_p_y,
    normalised,
    one_hot,
)

from .cases import Case


def gem_gradient(token: Token, given: Parameters) -> list[float]:
    """a − (Σa)·δ, a = softmax(z/β), times σ(0.01·(z − z_y)) in the second variant."""
    highest = max(token.followed)
    pull = normalised([math.exp((z - highest) / given["beta"]) for z in token.followed])
    if given["h"] == "logsigmoid":
        # softmax(z/β) is 0 where z is −∞, and so is its product with a sigmoid in [0, 1]
        above = [z - log_p_y(token) if z > -math.inf else 0.0 for z in token.followed]
        pull = [a / (1 + math.exp(-0.01 * z)) for a, z in zip(pull, above, strict=True)]
    total = math.fsum(pull)
    return [a - total * is_y for a, is_y in zip(pull, one_hot(token), strict=True)]


def expected_at(token: Token, name: str, form: str, given: Parameters) -> tuple[list[float], float]:
    """The target over the vocabulary and the scale at one position."""
    if name == "gem" or name in DIVERGENCES:
        gradient = (
            gem_gradient(token, given)
            if name == "gem"
            else divergences.gradient(name, token.followed, token.teacher, given)
        )
        return [math.exp(z) - g for z, g in zip(token.followed, gradient, strict=True)], 1.0
    trust, residual, scale = FORMULAS[name](token, given)
    if form == "frozen-weight":
        return one_hot(token), scale * trust
    target = [
        trust * is_y + (1 - trust) * rest
        for is_y, rest in zip(one_hot(token), residual, strict=True)
    ]
    return target, scale


def tokens_of(case: Case, form: str) -> list[list[Token]]:
    """Every position of every example, with what the example and the data set say of it."""
    followed = case.student if form == "live" else case.base
    observed = case.observed.tolist()
    places = [(i, t) for i, row in enumerate(observed) for t in range(len(row))]

    def at_observed(model: np.ndarray) -> dict[tuple[int, int], float]:
        return {(i, t): float(model[i, t, observed[i][t]]) for i, t in places}

    own, base, teacher = map(at_observed, (followed, case.base, case.teacher))
    losses = [-base[place] for place in places]
    excesses = [teacher[place] - base[place] for place in places]
    tokens = [
        [
            Token(
                followed=followed[i, t].tolist(),
                base=case.base[i, t].tolist(),
                teacher=case.teacher[i, t].tolist(),
                observed=y,
                mask=float(case.mask[i, t]),
                log_ratio=sum(own[i, u] - base[i, u] for u in range(len(row))) / len(row),
                losses=losses,
                excesses=excesses,
            )
            for t, y in enumerate(row)
        ]
        for i, row in enumerate(observed)
    ]
    entropies = [base_entropy(token) for row in tokens for token in row]
    importances = [importance(token) for row in tokens for token in row]
    return [
        [replace(token, entropies=entropies, importances=importances) for token in row]
        for row in tokens
    ]


def expected(case: Case, name: str, form: str, given: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """The target [B, T, V] and the scale [B, T]."""
    settled = DEFAULTS[name] | given
    rows = [
        [expected_at(token, name, form, settled) for token in example]
        for example in tokens_of(case, form)
    ]
    return (
        np.array([[target for target, _ in row] for row in rows]),
        np.array([[scale for _, scale in row] for row in rows]),
    )
