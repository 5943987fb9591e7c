"""Every method's loss and gradient against dense float64 arithmetic done here, from its paper.

p is the student, b the base, q the teacher. N positions, V vocabulary, S support entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.pipeline.methods import choices, dense_target
from qpipe.pipeline.records import TargetExample
from qpipe.trainer.collate import SparseTargets, collate
from qpipe.trainer.loss import induced_target
from qpipe.trainer.objective import Loss, Objective, objective_of
from torch import Tensor
from torch.nn.functional import kl_div, one_hot

V = 31  # above the twenty that eaft looks at
EXACT = {"rtol": 1e-10, "atol": 1e-13}

# What the methods are


@dataclass(frozen=True)
class Models:
    """Three models at N positions of some examples."""

    p: Tensor  # [N, V]
    b: Tensor  # [N, V]
    q: Tensor  # [N, V]
    observed: Tensor  # [N]
    example_of: Tensor  # [N]

    def at_observed(self, probs: Tensor) -> Tensor:
        return probs[torch.arange(len(probs)), self.observed]

    @property
    def one_hot(self) -> Tensor:
        return one_hot(self.observed, V).double()


@dataclass
class Rule:
    """γ, s and π̃ at each position; π̃ None where it is the followed model itself."""

    trust: Tensor  # [N]
    scale: Tensor  # [N]
    residual: Tensor | None  # [N, V]


def rule_of(name: str, models: Models, given: dict[str, Any]) -> Rule:
    """The row of the table; `models.p` is the followed model, whichever that is."""
    p, b, q = models.p, models.b, models.q
    p_y, b_y, q_y = (models.at_observed(probs) for probs in (p, b, q))
    one = torch.ones_like(p_y)
    match name:
        case "sft":
            return Rule(one, one, None)
        case "dft":
            return Rule(p_y, one, None)
        case "beyond-log":
            return Rule(p_y ** given["alpha"], one, None)
        case "profit":
            return Rule((p_y >= given["tau"]).double(), one, None)
        case "eaft":
            top = p.sort(1, descending=True).values[:, :20]
            top = top / top.sum(1, keepdim=True)
            return Rule((-(top * top.log()).sum(1) / 3.0) ** given["a"], one, None)
        case "iw-sft":
            log_ratio = p_y.log() - b_y.log()
            means = torch.stack(
                [log_ratio[models.example_of == example].mean() for example in models.example_of]
            )
            return Rule(one, torch.exp(given["T"] * means).clamp(0, 16), None)
        case "label-smoothing":
            return Rule((1 - given["lam"]) * one, one, torch.full_like(p, 1 / V))
        case "sft+kl":
            return Rule(one / (1 + given["lam"]), (1 + given["lam"]) * one, b)
        case "asft":
            return Rule(p_y / (p_y + given["lam"]), p_y + given["lam"], b)
        case "psft":
            ratio = p_y / b_y
            return Rule(one, ratio * (ratio <= 1 + given["eps_hi"]), None)
        case "kd":
            return Rule(0 * one, one, q)
        case "kd-hybrid":
            return Rule((1 - given["lam"]) * one, one, q)
        case "target-sft":
            mixture = p ** (1 - given["eta"]) * q ** given["eta"]
            return Rule(p_y, one, mixture / mixture.sum(1, keepdim=True))
        case "gift":
            odds = b_y.clamp(min=1e-10) * (math.exp(given["beta"]) - 1)
            return Rule(odds / (1 + odds), one, b)
        case "flow":
            return Rule(b_y ** (1 / given["tau"]), one, None)
        case "stm":
            return Rule((b_y >= given["tau"]).double(), one, None)
        case "token-cleaning":
            return Rule((q_y / b_y >= math.exp(given["threshold"])).double(), one, None)
        case "cft":
            return Rule(mask_of(models), one, None)
        case "contrast":
            ratio = torch.where(q >= given["alpha"] * q.amax(1, keepdim=True), q / b, 0)
            divergence = (q * (q / b).log()).sum(1)
            scale = (divergence >= given["beta"]).double()
            return Rule(0 * one, scale, ratio / ratio.sum(1, keepdim=True))
        case "idft":
            entropy = -(p * p.log()).sum(1)
            power = torch.exp(-(p_y.log() + entropy) / given["beta"]).clip(0.1, 2)
            return Rule(p_y**power, one, None)
        case "trsft":
            return Rule((p_y / given["tau"]).clip(max=1), one, None)
    raise AssertionError(name)


def mask_of(models: Models) -> Tensor:
    """A mask that comes with the demonstrations, of 0, 0.5 and 1."""
    return models.observed % 3 / 2.0


def gem_weights(models: Models, beta: float, h: str) -> Tensor:
    """a of gem, [N, V]."""
    sharpened = models.p ** (1 / beta)
    weights = sharpened / sharpened.sum(1, keepdim=True)
    if h == "linear":
        return weights
    odds = models.p / models.at_observed(models.p)[:, None]
    return weights * odds**0.01 / (1 + odds**0.01)  # σ(0.01·log odds)


def dense_loss(
    name: str, form: str, parameters: dict[str, Any], models: Models
) -> tuple[Tensor, Tensor]:
    """The losses [N] and the gradient of their sum with respect to the logits [N, V]."""
    p, delta = models.p, models.one_hot
    nll = -models.at_observed(p).log()
    if name == "gem":
        pull = gem_weights(models, **parameters)
        losses = (pull * (p.log() + nll[:, None])).sum(1)
        return losses, pull - pull.sum(1, keepdim=True) * delta
    followed = models if form == "live" else replace(models, p=models.b)
    rule = rule_of(name, followed, parameters)
    gradient_of_nll = p - delta
    weight = rule.scale * rule.trust
    if form == "frozen-weight" or (form == "live" and rule.residual is None):
        return weight * nll, weight[:, None] * gradient_of_nll
    residual = followed.p if rule.residual is None else rule.residual
    target = rule.trust[:, None] * delta + (1 - rule.trust[:, None]) * residual
    if name == "sft":
        target = delta
    cross_entropy = -(target * p.log()).sum(1)
    return rule.scale * cross_entropy, rule.scale[:, None] * (p - target)


# What a folder holds of them

PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "beyond-log": [{"alpha": 8.0}, {"alpha": 0.5}],
    "profit": [{"tau": 0.1}],
    "eaft": [{"a": 1.0}, {"a": 2.5}],
    "iw-sft": [{"T": 1.0}, {"T": 12.0}],
    "label-smoothing": [{"lam": 0.1}],
    "sft+kl": [{"lam": 0.1}],
    "asft": [{"lam": 0.1}, {"lam": 2.0}],
    "psft": [{"eps_hi": 0.28}],
    "gem": [{"beta": 0.7, "h": "linear"}, {"beta": 0.7, "h": "logsigmoid"}],
    "kd-hybrid": [{"lam": 0.3}],
    "target-sft": [{"eta": 0.5}, {"eta": 0.2}, {"eta": 0.0}, {"eta": 1.0}],
    "gift": [{"beta": 3.0}],
    "flow": [{"tau": 1.7}],
    "stm": [{"tau": 0.4}],
    "token-cleaning": [{"keep": 0.6, "threshold": 0.3}],
    "contrast": [{"alpha": 0.2, "beta": 0.4}],
    "idft": [{"beta": 1.0}, {"beta": 0.3}],
    "trsft": [{"tau": 0.1}],
}
OF_WEIGHTS = ["dft", "beyond-log", "profit", "eaft", "cft", "flow", "stm", "token-cleaning"]
OF_TARGETS = ["label-smoothing", "sft+kl", "asft", "kd", "kd-hybrid", "target-sft", "gift"]
OF_TARGETS += ["contrast"]
LIVE_ONLY = ["iw-sft", "psft", "gem", "idft", "trsft"]
READS_STUDENT = ["dft", "beyond-log", "profit", "eaft", "asft", "target-sft", *LIVE_ONLY]

FORMS: dict[str, list[str]] = {
    "sft": ["frozen-target", "frozen-weight", "live"],
    **{name: ["frozen-target", "frozen-weight", "live"] for name in OF_WEIGHTS},
    **{name: ["frozen-target", "live"] for name in OF_TARGETS},
    **{name: ["live"] for name in LIVE_ONLY},
}
Case = tuple[str, str, dict[str, Any]]
CASES: list[Case] = [
    (name, form, parameters)
    for name, forms in FORMS.items()
    for form in forms
    for parameters in PARAMETERS.get(name, [{}])
]
LIVE_CASES = [case for case in CASES if case[1] == "live" and case[0] in READS_STUDENT]
FROZEN_CASES = [case for case in CASES if case[1] != "live"]


def case_id(value: Any) -> str:
    return ",".join(map(str, value.values())) or "-" if isinstance(value, dict) else str(value)


over = partial(pytest.mark.parametrize, ("name", "form", "parameters"), ids=case_id)


def stored_of(name: str, form: str) -> str:
    """Which distribution the folder holds."""
    if form == "frozen-weight" or name == "sft":
        return "observed"
    if form == "live" and name in ("iw-sft", "psft"):
        return "base-observed"
    if name in OF_WEIGHTS:
        return "base" if form == "frozen-target" else "observed"
    if form == "live" and name == "target-sft":
        return "teacher"
    stored = {
        "label-smoothing": "uniform",
        "sft+kl": "base",
        "asft": "base",
        "kd": "teacher",
        "kd-hybrid": "teacher",
        "target-sft": "mixture",
        "gift": "base",
        "contrast": "contrast",
    }
    return stored.get(name, "observed")


def folder_settings(name: str, form: str, parameters: dict[str, Any]) -> dict[str, Any]:
    stored = stored_of(name, form)
    tail_shape = "uniform" if stored == "uniform" else "student"
    own = {"method": name, "form": form, "parameters": parameters}
    return own | {"residual": stored, "tail_shape": tail_shape}


def objective_for(name: str, form: str, parameters: dict[str, Any]) -> Objective:
    return objective_of(folder_settings(name, form, parameters), name)


def folder_targets(
    name: str, form: str, parameters: dict[str, Any], models: Models
) -> SparseTargets:
    """What build-targets would store, over the whole vocabulary."""
    frozen = replace(models, p=models.b)
    if form == "live" and name in READS_STUDENT:
        trust = weights = torch.ones(len(models.observed)).double()
    else:
        rule = rule_of(name, frozen, parameters)
        trust, weights = rule.trust, rule.scale
        if form == "frozen-weight" or (form == "live" and rule.residual is None):
            trust, weights = torch.ones_like(trust), rule.scale * rule.trust
    match stored_of(name, form):
        case "observed":
            return of_observed(models, torch.ones_like(trust), trust, weights)
        case "base-observed":
            return of_observed(models, models.at_observed(models.b), trust, weights)
        case "uniform":
            return of_observed(models, torch.full_like(trust, 1 / V), trust, weights)
        case "base":
            residual = models.b
        case "teacher":
            residual = models.q
        case _:
            residual = rule_of(name, frozen, parameters).residual
            assert residual is not None
    ids_NV = torch.argsort(torch.rand(residual.shape), dim=1)
    return SparseTargets(
        observed_ids=models.observed,
        example_of=models.example_of,
        trust=trust,
        weights=weights,
        support_ids=ids_NV,
        support_mask=torch.ones_like(ids_NV, dtype=torch.bool),
        support_probs=residual.gather(1, ids_NV),
        tail_mass=torch.zeros_like(trust),
    )


def of_observed(models: Models, probs: Tensor, trust: Tensor, weights: Tensor) -> SparseTargets:
    """A support of the observed token alone."""
    return SparseTargets(
        observed_ids=models.observed,
        example_of=models.example_of,
        trust=trust,
        weights=weights,
        support_ids=models.observed[:, None],
        support_mask=torch.ones(len(probs), 1, dtype=torch.bool),
        support_probs=probs[:, None],
        tail_mass=1 - probs,
    )


def random_models(count: int = 150, seed: int = 0, spread: float = 2.5) -> tuple[Tensor, Models]:
    """A student's logits, and it with a base and a teacher that are not far from it."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    logits = torch.tensor(rng.normal(0, spread, (count, V)))
    b, q = (
        (logits + torch.tensor(rng.normal(0, spread / 2, (count, V)))).softmax(1) for _ in range(2)
    )
    p = logits.softmax(1)
    # the likeliest, any, or the least likely token
    rank = torch.tensor(rng.choice([0, 0, rng.integers(V), V - 1], count))
    observed = p.argsort(1, descending=True)[torch.arange(count), rank]
    example_of = torch.tensor(np.sort(rng.integers(0, 1 + count // 6, count)))
    return logits + 7 * torch.randn(count, 1).double(), Models(p, b, q, observed, example_of)


def loss_and_gradient(
    objective: Objective, logits_NV: Tensor, targets: SparseTargets
) -> tuple[Loss, Tensor]:
    leaf = logits_NV.detach().clone().requires_grad_()
    loss = objective(leaf, targets)
    (gradient,) = torch.autograd.grad(loss.sum, leaf)
    return loss, gradient


def to_dtype(targets: SparseTargets, dtype: torch.dtype) -> SparseTargets:
    """The same targets, their real numbers in another precision."""
    values = (getattr(targets, field.name) for field in fields(targets))
    return SparseTargets(*(v.to(dtype) if v.is_floating_point() else v for v in values))


# The whole vocabulary


@over(CASES)
def test_loss_and_gradient_are_the_dense_ones(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    """A gradient through γ, s or the mixture, or a KL for the cross-entropy, would be seen."""
    logits, models = random_models()
    targets = folder_targets(name, form, parameters, models)
    objective = objective_for(name, form, parameters)
    losses, expected = dense_loss(name, form, parameters, models)
    loss, gradient = loss_and_gradient(objective, logits, targets)
    torch.testing.assert_close(loss.sum.detach(), losses.sum(), **EXACT)
    torch.testing.assert_close(gradient, expected, **EXACT)


@over(CASES)
def test_each_position_counts_by_its_own_weight(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    logits, models = random_models(seed=1)
    targets = folder_targets(name, form, parameters, models)
    factors = torch.rand(len(models.observed)).double() * 3
    factors[:5] = 0
    weighted = replace(targets, weights=targets.weights * factors)
    losses, expected = dense_loss(name, form, parameters, models)
    loss, gradient = loss_and_gradient(objective_for(name, form, parameters), logits, weighted)
    torch.testing.assert_close(loss.sum.detach(), (factors * losses).sum(), **EXACT)
    torch.testing.assert_close(gradient, factors[:, None] * expected, **EXACT)


def test_the_random_models_reach_both_sides_of_every_threshold() -> None:
    """Or a rule without its clamp would pass the tests above."""
    _, models = random_models()
    p_y, b_y = models.at_observed(models.p), models.at_observed(models.b)
    power = -(p_y.log() - (models.p * models.p.log()).sum(1)) / 0.3
    for sides in (
        p_y >= 0.1,
        b_y >= 0.4,
        p_y / b_y <= 1.28,
        rule_of("iw-sft", models, {"T": 12.0}).scale < 16,
        power < math.log(2),
        power > math.log(0.1),
        rule_of("contrast", models, {"alpha": 0.2, "beta": 0.4}).scale > 0,
        rule_of("token-cleaning", models, {"threshold": 0.3}).trust > 0,
    ):
        assert 0 < sides.sum() < len(sides)


@pytest.mark.parametrize(("name", "form"), [(n, f) for n, forms in FORMS.items() for f in forms])
def test_the_reference_here_and_dense_target_agree(name: str, form: str) -> None:
    """Two derivations of one table: s·(p − Q) is the same."""
    _, models = random_models(seed=2)
    parameters = PARAMETERS.get(name, [{}])[0]
    one_example = replace(models, example_of=torch.zeros_like(models.example_of))
    _, expected = dense_loss(name, form, parameters, one_example)
    target, scale = dense_target(
        name,
        form=form,
        student_log_probs=models.p.log(),
        base_log_probs=models.b.log(),
        teacher_log_probs=models.q.log(),
        observed=models.observed,
        mask=mask_of(models),
        **parameters,
    )
    torch.testing.assert_close(scale[:, None] * (models.p - target), expected, **EXACT)


def test_every_method_and_form_of_the_table_is_tested() -> None:
    table = {(choice.method.name, choice.form) for choice in choices()}
    assert table == {(name, form) for name, form, _ in CASES}
    for choice in choices():
        assert choice.stored == stored_of(choice.method.name, choice.form)
        reads_student = choice.form == "live" and choice.method.name in READS_STUDENT
        assert choice.reads_student == reads_student


@over([case for case in FROZEN_CASES if case[0] not in LIVE_ONLY])
def test_live_and_frozen_gradients_agree_while_the_student_is_the_base(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    logits, models = random_models(seed=3)
    at_base = replace(models, b=models.p)
    gradients = [
        loss_and_gradient(
            objective_for(name, each, parameters),
            logits,
            folder_targets(name, each, parameters, at_base),
        )[1]
        for each in (form, "live")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)
    # and part ways after
    if name in READS_STUDENT and parameters != {"eta": 1.0}:
        live = folder_targets(name, "live", parameters, at_base)
        frozen = folder_targets(name, form, parameters, at_base)
        moved = logits + torch.randn_like(logits)
        _, left = loss_and_gradient(objective_for(name, "live", parameters), moved, live)
        _, right = loss_and_gradient(objective_for(name, form, parameters), moved, frozen)
        assert (left - right).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(FORMS))
def test_sft_can_be_trained_on_any_folder(name: str) -> None:
    logits, models = random_models(seed=4)
    parameters = PARAMETERS.get(name, [{}])[0]
    targets = folder_targets(name, "live", parameters, models)
    ones = torch.ones_like(targets.trust)
    hard = replace(targets, trust=ones, weights=ones)
    objective = objective_of(folder_settings(name, "live", parameters), "sft")
    loss, gradient = loss_and_gradient(objective, logits, hard)
    expected = -models.at_observed(models.p).log().sum()
    torch.testing.assert_close(loss.sum.detach(), expected, **EXACT)
    torch.testing.assert_close(gradient, models.p - models.one_hot, **EXACT)
    assert loss.error_bounds is None


def test_the_error_is_bounded_for_live_target_sft_alone() -> None:
    logits, models = random_models(count=5)
    for case in CASES:
        loss = objective_for(*case)(logits, folder_targets(*case, models))
        assert (loss.error_bounds is not None) == (case[:2] == ("target-sft", "live"))


# A support and its tail


@dataclass
class Truncated:
    """Random models with one of them known on random supports."""

    logits: Tensor
    models: Models
    targets: SparseTargets
    in_support: Tensor  # [N, V]


def truncate(seed: int, count: int, spread: float, residual: str) -> Truncated:
    """Supports of 1 to V ids in any order, padded; a few known probabilities are 0."""
    logits, models = random_models(count, seed, spread)
    rng = np.random.default_rng(seed)
    known = getattr(models, residual).clone()
    known[torch.tensor(rng.random((count, V)) < rng.choice([0.0, 0.3]))] = 0
    known[torch.arange(count), models.observed] += 1e-3
    known = known / known.sum(1, keepdim=True)
    models = replace(models, **{residual: known})
    sizes = torch.tensor(rng.choice([1, 2, 5, V // 2, V - 1, V], count))
    # the observed token first, then the padding after as many others as fit
    order = torch.tensor(rng.random((count, V)))
    order[torch.arange(count), models.observed] = -1
    ids_NV = order.argsort(1)
    mask_NV = torch.arange(V) < sizes[:, None]
    shuffled = torch.where(mask_NV, torch.tensor(rng.random((count, V))), 2.0).argsort(1)
    ids_NV = torch.where(mask_NV, ids_NV.gather(1, shuffled), models.observed[:, None])
    width = int(sizes.max())
    in_support = torch.zeros(count, V, dtype=torch.bool).scatter(1, ids_NV, True)
    ones = torch.ones(count).double()
    targets = SparseTargets(
        observed_ids=models.observed,
        example_of=models.example_of,
        trust=ones,
        weights=ones,
        support_ids=ids_NV[:, :width],
        support_mask=mask_NV[:, :width],
        support_probs=torch.where(mask_NV, known.gather(1, ids_NV), 0)[:, :width],
        tail_mass=torch.where(in_support, 0, known).sum(1),
    )
    assert torch.equal(in_support.sum(1), sizes)
    return Truncated(logits, models, targets, in_support)


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.1, 6),
    eta=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.8, 1.0]) | st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_live_target_sft_on_a_support(seed: int, spread: float, eta: float) -> None:
    """100 positions at a time: Q̂ as derived, and its distance from the Q of the full teacher."""
    case = truncate(seed, 100, spread, "q")
    models, inside = case.models, case.in_support
    p, q, p_y = models.p, models.q, models.at_observed(models.p)
    objective = objective_for("target-sft", "live", {"eta": eta})
    loss, gradient = loss_and_gradient(objective, case.logits, case.targets)

    product = torch.where(inside, p ** (1 - eta) * q**eta, 0)
    p_tail, q_tail = (torch.where(inside, 0, probs).sum(1) for probs in (p, q))
    # the bucket is there while the support is not the whole vocabulary
    tail = torch.where(inside.all(1), 0, p_tail ** (1 - eta) * q_tail**eta)
    norm = product.sum(1) + tail
    tail_mass = tail / norm
    shape = torch.where(inside, 0, p) / p_tail.clamp(min=1e-300)[:, None]
    mixed = product / norm[:, None] + tail_mass[:, None] * shape
    target = p_y[:, None] * models.one_hot + (1 - p_y)[:, None] * mixed
    torch.testing.assert_close(gradient, p - target, rtol=1e-9, atol=1e-12)
    on_support = torch.where(inside, target * p.log(), 0).sum(1)
    in_tail = torch.where(tail_mass > 0, (1 - p_y) * tail_mass * p_tail.log(), 0)
    expected = -(on_support + in_tail).sum()
    torch.testing.assert_close(loss.sum.detach(), expected, rtol=1e-9, atol=1e-9)

    _, dense = dense_loss("target-sft", "live", {"eta": eta}, models)
    error = (gradient - dense).abs().sum(1)
    bound = 2 * (1 - p_y) * tail_mass
    assert (error <= bound + 1e-12).all()
    assert loss.error_bounds is not None
    torch.testing.assert_close(loss.error_bounds, bound, rtol=1e-9, atol=1e-12)
    if eta == 0:
        torch.testing.assert_close(gradient, dense, rtol=1e-9, atol=1e-12)  # dft


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_bound_of_target_sft_can_be_reached(weight: float) -> None:
    """A teacher whose mass outside lies where the student has next to none: 2·(1 − p_y)·m̂."""
    p = torch.tensor([[0.1, 1e-9, 0.9 - 1e-9]]).double()
    q = torch.tensor([[0.1, 0.9 - 1e-9, 1e-9]]).double()
    one = torch.ones(1).double()
    targets = SparseTargets(
        *(torch.tensor([0]), torch.tensor([0]), one, weight * one),
        *(torch.tensor([[0]]), torch.tensor([[True]]), torch.tensor([[0.1]]).double(), 0.9 * one),
    )
    objective = objective_for("target-sft", "live", {"eta": 0.5})
    loss, gradient = loss_and_gradient(objective, p.log(), targets)
    mixture = (p * q).sqrt() / (p * q).sqrt().sum()
    dense = weight * (p - 0.1 * torch.tensor([[1.0, 0, 0]]) - 0.9 * mixture)
    error = (gradient - dense).abs().sum()
    assert error.item() == pytest.approx(weight * 2 * 0.9 * 0.9, rel=1e-3)
    assert loss.error_bounds is not None
    assert loss.error_bounds.item() == pytest.approx(weight * 2 * 0.9 * 0.9)


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 6), lam=st.floats(0, 5))
@settings(max_examples=40, deadline=None)
def test_live_asft_on_a_support(seed: int, spread: float, lam: float) -> None:
    """Right on the support and on the total of the tail, where it has the student's shape."""
    case = truncate(seed, 100, spread, "b")
    models, inside = case.models, case.in_support
    objective = objective_for("asft", "live", {"lam": lam})
    loss, gradient = loss_and_gradient(objective, case.logits, case.targets)
    _, dense = dense_loss("asft", "live", {"lam": lam}, models)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(torch.where(inside, gradient, 0), torch.where(inside, dense, 0))
    tail_gradient, dense_tail = (torch.where(inside, 0, g).sum(1) for g in (gradient, dense))
    close(tail_gradient, dense_tail)
    p_tail = torch.where(inside, 0, models.p).sum(1)
    shape = torch.where(inside, 0, models.p) / p_tail.clamp(min=1e-300)[:, None]
    close(torch.where(inside, 0, gradient), tail_gradient[:, None] * shape)

    # the cross-entropy to p_y·δ + lam·b over the support and the bucket
    weighted = models.at_observed(models.p)[:, None] * models.one_hot + lam * models.b
    on_support = torch.where(inside, weighted * models.p.log(), 0).sum(1)
    tail = torch.where(inside, 0, weighted).sum(1)
    in_tail = torch.where(tail > 0, tail * p_tail.log(), 0)
    torch.testing.assert_close(
        loss.sum.detach(), -(on_support + in_tail).sum(), rtol=1e-9, atol=1e-9
    )


# What a batch is made of


def one_token_example(name: str, observed: list[int], base_probs: list[float]) -> TargetExample:
    """An example of a `base-observed` folder, each of its tokens but the first supervised."""
    count = len(observed)
    return TargetExample(
        id=name,
        input_ids=np.array([0, *observed], np.int32),
        positions=np.arange(1, count + 1, dtype=np.int32),
        trust=np.ones(count, np.float32),
        counts=np.ones(count, np.int32),
        support_ids=np.array(observed, np.int32),
        support_probs=np.array(base_probs, np.float32),
        tail_mass=1 - np.array(base_probs, np.float32),
        weights=np.ones(count, np.float32),
    )


def test_iw_sft_takes_its_mean_over_each_example() -> None:
    """By hand: √(2·½) = 1 where a mean over the batch is 4.8, and 64 capped."""
    batch = collate(
        [
            one_token_example("none", [], []),
            one_token_example("two", [1, 2], [0.25, 0.5]),
            one_token_example("nothing", [], []),
            one_token_example("one", [3], [0.125]),
            one_token_example("capped", [1, 2, 3], [2**-8, 2**-8, 2**-8]),
            one_token_example("last", [], []),
        ]
    )
    targets = to_dtype(batch.targets, torch.float64)
    p = torch.tensor([0.125, 0.5, 0.25, 0.125]).double().expand(6, 4)
    leaf = p.log().requires_grad_()
    loss = objective_for("iw-sft", "live", {"T": 1.0})(leaf, targets)
    # p/b: 2 and 0.5; 1; 128, 64 and 32
    weights = torch.tensor([1.0, 1.0, 1.0, 16.0, 16.0, 16.0]).double()
    assert batch.targets.example_of.tolist() == [1, 1, 3, 4, 4, 4]
    nll = -torch.tensor([0.5, 0.25, 0.125, 0.5, 0.25, 0.125]).double().log()
    assert loss.sum.item() == pytest.approx(float((weights * nll).sum()), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum, leaf)
    expected = weights[:, None] * (p - one_hot(targets.observed_ids, 4))
    torch.testing.assert_close(gradient, expected, **EXACT)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    temperature=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_iw_sft_of_a_batch_is_that_of_its_examples_alone(
    lengths: list[int], temperature: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    examples = [
        one_token_example(
            str(i), [int(y) for y in rng.integers(0, V, n)], [float(b) for b in rng.random(n)]
        )
        for i, n in enumerate(lengths)
    ]
    logits = torch.tensor(rng.normal(0, 2, (sum(lengths), V)))
    objective = objective_for("iw-sft", "live", {"T": temperature})
    targets = to_dtype(collate(examples).targets, torch.float64)
    whole, gradient = loss_and_gradient(objective, logits, targets)
    total, start = 0.0, 0
    for example in examples:
        stop = start + len(example.positions)
        own = to_dtype(collate([example]).targets, torch.float64)
        part, own_gradient = loss_and_gradient(objective, logits[start:stop], own)
        torch.testing.assert_close(gradient[start:stop], own_gradient, **EXACT)
        if stop > start:
            observed = torch.tensor(example.observed_ids).long()[:, None]
            log_p = logits[start:stop].log_softmax(1).gather(1, observed)[:, 0]
            log_b = torch.tensor(example.support_probs).double().log()
            weight = min(16.0, math.exp(temperature * float((log_p - log_b).mean())))
            assert part.sum.item() == pytest.approx(-weight * float(log_p.sum()), rel=1e-10)
        total, start = total + part.sum.item(), stop
    assert whole.sum.item() == pytest.approx(total, rel=1e-10)


@over(CASES)
def test_no_positions_give_a_zero_with_a_gradient(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    logits = torch.zeros(0, V, requires_grad=True)
    loss = objective_for(name, form, parameters)(logits, collate([]).targets)
    loss.sum.backward()
    assert loss.sum.item() == 0
    assert logits.grad is not None
    if loss.error_bounds is not None:
        assert loss.error_bounds.shape == (0,)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@over(CASES)
def test_narrow_logits_come_close_to_float64(
    name: str, form: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    """Only the logits are narrow: what is done with them is done in float32."""
    logits, models = random_models(seed=5)
    narrow = logits.to(dtype)
    targets = folder_targets(name, form, parameters, models)
    objective = objective_for(name, form, parameters)
    loss, gradient = loss_and_gradient(objective, narrow, to_dtype(targets, torch.float32))
    exact, exact_gradient = loss_and_gradient(objective, narrow.double(), targets)
    assert loss.sum.dtype == torch.float32
    assert gradient.dtype == dtype
    assert loss.sum.item() == pytest.approx(exact.sum.item(), rel=1e-5)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@over(CASES)
def test_extreme_logits_give_no_nan(
    name: str, form: str, parameters: dict[str, Any], dtype: torch.dtype
) -> None:
    """Probabilities that are 0 or 1 to rounding: of the observed token, and of the others."""
    _, models = random_models(count=6, seed=6)
    logits = torch.zeros(6, V).double()
    rows = torch.arange(6)
    other = (models.observed + 1) % V
    logits[0, models.observed[0]] = 1e4
    logits[1, models.observed[1]] = -1e4
    logits[2, other[2]] = 1e4
    logits[3] = torch.where(rows[3] + torch.arange(V) % 2 == 3, 1e4, -1e4)
    logits[4] += 1e4
    logits[5] -= 1e4
    targets = folder_targets(name, form, parameters, models)
    objective = objective_for(name, form, parameters)
    narrow = to_dtype(targets, torch.promote_types(dtype, torch.float32))
    loss, gradient = loss_and_gradient(objective, logits.to(dtype), narrow)
    assert loss.sum.isfinite()
    assert gradient.isfinite().all()


_MASKED = [case for case in CASES if case[0] != "label-smoothing"]  # which is infinite there


@over(_MASKED)
def test_tokens_that_the_student_rules_out(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    """Logits of −∞ outside the support, as of an embedding that is padded: as if they were not."""
    logits, models = random_models(seed=7)
    ruled_out = torch.rand(logits.shape) < 0.3
    ruled_out[torch.arange(len(logits)), models.observed] = False
    logits = logits.masked_fill(ruled_out, -torch.inf)
    models = replace(models, p=logits.softmax(1))
    for residual in ("b", "q"):
        probs = getattr(models, residual).masked_fill(ruled_out, 0)
        models = replace(models, **{residual: probs / probs.sum(1, keepdim=True)})
    # the reference knows no 0·log 0: the dense one of finite logits, far down
    far_down = logits.masked_fill(ruled_out, -200.0 + logits.amax())
    tiny = replace(
        models,
        p=far_down.softmax(1),
        b=torch.where(ruled_out, 1e-90, models.b),
        q=torch.where(ruled_out, 1e-90, models.q),
    )
    losses, expected = dense_loss(name, form, parameters, tiny)
    targets = with_holes(folder_targets(name, form, parameters, tiny), ruled_out)
    loss, gradient = loss_and_gradient(objective_for(name, form, parameters), logits, targets)
    torch.testing.assert_close(loss.sum.detach(), losses.sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    narrow, its_gradient = loss_and_gradient(
        objective_for(name, form, parameters), logits.bfloat16(), to_dtype(targets, torch.float32)
    )
    assert narrow.sum.isfinite()
    assert its_gradient.isfinite().all()


def with_holes(targets: SparseTargets, ruled_out: Tensor) -> SparseTargets:
    """The targets with these tokens out of the support; they had no mass."""
    if targets.support_ids.shape[1] == 1:
        return targets
    is_out = ruled_out.gather(1, targets.support_ids)
    return replace(
        targets,
        support_mask=~is_out,
        support_ids=torch.where(is_out, targets.observed_ids[:, None], targets.support_ids),
        support_probs=torch.where(is_out, 0, targets.support_probs),
    )


# The inversion

LossFn = Callable[[Tensor, Tensor], Tensor]


def log_p_y(logits: Tensor, observed: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, observed[..., None])[..., 0]


def sft_loss(logits: Tensor, observed: Tensor) -> Tensor:
    return -log_p_y(logits, observed)


def dft_loss(logits: Tensor, observed: Tensor) -> Tensor:
    nll = -log_p_y(logits, observed)
    return torch.exp(-nll).detach() * nll


def beyond_log_loss(logits: Tensor, observed: Tensor) -> Tensor:
    """As in the paper: not detached."""
    return (1 - log_p_y(logits, observed).exp() ** 3) / 3


def gem_loss(logits: Tensor, observed: Tensor) -> Tensor:
    pull = (logits / 0.7).softmax(-1).detach()
    return (pull * (logits - logits.gather(-1, observed[..., None]))).sum(-1)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5)])
@pytest.mark.parametrize("reduce", [False, True])
def test_induced_targets_are_those_of_the_table(shape: tuple[int, ...], reduce: bool) -> None:
    logits_NV, models = random_models(math.prod(shape), seed=8)
    logits, observed = logits_NV.reshape(*shape, V), models.observed.reshape(shape)
    b, q = models.b.reshape(*shape, V), models.q.reshape(*shape, V)

    def asft_loss(logits: Tensor, observed: Tensor) -> Tensor:
        """As in the paper: dft and 0.1·KL(b ‖ p)."""
        divergence = kl_div(logits.log_softmax(-1), b, reduction="none").sum(-1)
        return dft_loss(logits, observed) + 0.1 * divergence

    def kd_loss(logits: Tensor, observed: Tensor) -> Tensor:
        return -(q * logits.log_softmax(-1)).sum(-1)

    def target_sft_loss(logits: Tensor, observed: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1)
        p = log_probs.exp().detach()
        mixture = (p * q).sqrt() / (p * q).sqrt().sum(-1, keepdim=True)
        p_y = p.gather(-1, observed[..., None])
        target = p_y * one_hot(observed, V) + (1 - p_y) * mixture
        return -(target * log_probs).sum(-1)

    expected: list[tuple[LossFn, str, dict[str, Any]]] = [
        (sft_loss, "sft", {}),
        (dft_loss, "dft", {}),
        (beyond_log_loss, "beyond-log", {"alpha": 3.0}),
        (gem_loss, "gem", {"beta": 0.7, "h": "linear"}),
        (asft_loss, "asft", {"lam": 0.1}),
        (kd_loss, "kd", {}),
        (target_sft_loss, "target-sft", {"eta": 0.5}),
    ]
    for own, name, parameters in expected:
        loss_fn = (lambda z, y, own=own: own(z, y).sum()) if reduce else own
        found = induced_target(loss_fn, logits, observed)
        _, gradient = dense_loss(name, "live", parameters, models)
        assert found.shape == logits.shape
        assert not found.requires_grad
        torch.testing.assert_close(found.sum(-1), torch.ones(shape).double(), **EXACT)
        torch.testing.assert_close(found.reshape(-1, V), models.p - gradient, **EXACT)
    sft = induced_target(sft_loss, logits, observed)
    torch.testing.assert_close(sft, one_hot(observed, V).double(), rtol=0, atol=1e-12)
    assert logits.grad is None
    assert not logits.requires_grad


@over(LIVE_CASES)
def test_the_objectives_themselves_induce_their_targets(
    name: str, form: str, parameters: dict[str, Any]
) -> None:
    logits, models = random_models(seed=9)
    targets = folder_targets(name, form, parameters, models)
    objective = objective_for(name, form, parameters)
    found = induced_target(lambda z, _: objective(z, targets).sum, logits, models.observed)
    _, gradient = dense_loss(name, form, parameters, models)
    torch.testing.assert_close(found, models.p - gradient, **EXACT)


def test_induced_target_ignores_a_gradient_that_waits() -> None:
    """Of a leaf in training neither its gradient nor its graph is touched."""
    logits = torch.randn(3, V, requires_grad=True)
    with torch.no_grad():
        outside = logits.clone()
    observed = torch.tensor([0, 1, 2])
    found = induced_target(sft_loss, logits, observed)
    assert logits.grad is None
    assert torch.equal(found, induced_target(sft_loss, outside, observed))
    assert found.dtype == torch.float32
