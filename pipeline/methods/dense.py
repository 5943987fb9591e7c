"""Targets over the whole vocabulary: the plain reference for every sparse path.

V vocabulary; [...] any shape of positions, whose last axis is one example.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from array_api_compat import array_namespace

from ..errors import UserError
from . import rules
from .definition import Choice
from .rules import Array, Signals


def dense(
    choice: Choice, models: Mapping[str, Array], observed: Array, mask: Array = None
) -> tuple[Array, Array]:
    """The target [..., V] and the scale [...]; see `methods.dense_target`.

    `models` holds log p(·) [..., V] of the student, the base and the teacher, or None.
    """
    if all(array is None for array in models.values()):
        raise UserError(f"{choice.method.name} needs a model's log-probabilities")
    given = _Given(choice.method.name, models)
    signals = _signals(choice, given, observed, mask)
    statistic = choice.unresolved
    if statistic is not None:
        values = statistic.values(signals, choice.parameters).reshape(-1)
        values = array_namespace(values).sort(values)
        places = statistic.places(len(values), choice.parameters)
        found = sum(float(values[place]) for place in places) / max(len(places), 1)
        choice = choice.resolved(found if places else statistic.otherwise)
    return _target(choice, given, observed, signals)


@dataclass(frozen=True, slots=True)
class _Given:
    """The log-probabilities of the given models."""

    method: str
    models: Mapping[str, Array]

    def __getitem__(self, model: str) -> Array:
        if self.models[model] is None:
            raise UserError(f"{self.method} needs {model}_log_probs")
        return self.models[model]


def _signals(choice: Choice, given: _Given, observed: Array, mask: Array) -> Signals:
    followed = "student" if choice.form == "live" else "base"

    def at_observed(model: str) -> Array:
        is_observed = _one_hot(observed, given[model])
        xp = array_namespace(given[model])
        return xp.sum(xp.where(is_observed, given[model], 0.0), axis=-1)

    def top() -> Array:
        xp = array_namespace(given[followed])
        highest_first = xp.sort(given[followed], axis=-1, descending=True)
        return rules.renormalised_entropy(highest_first[..., : rules.TOP_ENTROPY_SIZE])

    def sequence_log_ratio() -> Array:
        ratio = at_observed(followed) - at_observed("base")
        xp = array_namespace(ratio)
        return xp.zeros_like(ratio) + xp.mean(ratio, axis=-1, keepdims=True)

    def given_mask() -> Array:
        if mask is None:
            raise UserError(f"{choice.method.name} needs a mask")
        like = next(array for array in given.models.values() if array is not None)
        return array_namespace(like).asarray(mask, dtype=like.dtype)

    compute: dict[str, Callable[[], Array]] = {
        "log_prob": lambda: at_observed(followed),
        "entropy": lambda: rules.entropy(given[followed]),
        "top_entropy": top,
        "concentration": lambda: rules.concentration(given[followed]),
        "rank": lambda: rules.rank(given[followed], at_observed(followed)),
        "expected_rank": lambda: rules.expected_rank(given[followed]),
        "sequence_log_ratio": sequence_log_ratio,
        "base_log_prob": lambda: at_observed("base"),
        "base_mass": lambda: rules.mass_up_to(given["base"], at_observed("base")),
        "base_entropy": lambda: rules.entropy(given["base"]),
        "teacher_log_prob": lambda: at_observed("teacher"),
        "divergence": lambda: rules.divergence(given["teacher"], given["base"]),
        "mask": given_mask,
    }
    reads = choice.method.reads | choice.statistic_reads
    if not reads:  # a rule still needs the shape
        model = next(name for name in given.models if given.models[name] is not None)
        return Signals(log_prob=at_observed(model))
    return Signals(**{name: compute[name]() for name in reads})


def _target(
    choice: Choice, given: _Given, observed: Array, signals: Signals
) -> tuple[Array, Array]:
    trust, scale = choice.trust_and_scale(signals)
    if choice.form == "frozen-weight":
        trust, scale = array_namespace(trust).ones_like(trust), scale * trust
    like = next(array for array in given.models.values() if array is not None)
    is_observed = _one_hot(observed, like)
    xp = array_namespace(like)
    one_hot = xp.astype(is_observed, like.dtype)
    if choice.residual == "gem":
        log_probs = given["student"]
        gradient = rules.matching_gradient(log_probs, is_observed, **choice.parameters)
        return xp.exp(log_probs) - gradient, scale
    if choice.method.divergence is not None:
        divergence, parameters = choice.method.divergence, choice.parameters
        return divergence(given["student"], given["teacher"], parameters)[1], scale
    residual = _residual(choice, given, one_hot)
    return trust[..., None] * one_hot + (1 - trust[..., None]) * residual, scale


def _residual(choice: Choice, given: _Given, one_hot: Array) -> Array:
    xp = array_namespace(one_hot)
    match choice.residual:
        case "observed":
            return one_hot
        case "student" | "base" | "teacher":
            return xp.exp(given[choice.residual])
        case "uniform":
            return xp.full_like(one_hot, 1 / one_hot.shape[-1])
        case "contrast":
            ratio = rules.contrast(given["teacher"], given["base"], choice.parameters["alpha"])
            return xp.exp(ratio)
        case _:
            own = given["student" if choice.form == "live" else "base"]
            no_tail = xp.full_like(own[..., 0], -float("inf"))
            mixed, _ = rules.mixture(own, no_tail, given["teacher"], no_tail, *choice.mixing)
            return xp.exp(mixed)


def _one_hot(observed: Array, like: Array) -> Array:
    """True at the observed token, [..., V]."""
    xp = array_namespace(like)
    return xp.arange(like.shape[-1]) == xp.asarray(observed)[..., None]
