"""Loss and gradient of every method, over the whole vocabulary, against the dense ones."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from qpipe.pipeline.methods.table import choices
from qpipe.tests.support.methods import DIVERGENCES, LIVE_ONLY, NAMES, READS_STUDENT
from qpipe.trainer.loss.objective import objective_of

from .dense import EXACT, dense_loss, rule_of
from .folders import (
    CASES,
    FROZEN_CASES,
    PARAMETERS,
    folder_settings,
    folder_targets,
    loss_and_gradient,
    objective_for,
    over,
    random_models,
)

MIXTURES = (("target-sft", "live"), ("amid", "live"))


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
        rule_of("prift-mass", models, {"tau": 0.1}).trust > 0,
        rule_of("infosft", models, {"P": 0.7}).scale > 0,
        rule_of("talr", models, {"tau": 1.7, "floor": 0.1}).trust > 0.1,
        rule_of("ranktuner", models, {"power": 0.0}).scale < 1,
        rule_of("se-kd", models, {"threshold": 2.0}).scale > 0,
        rule_of("tip", models, {"threshold": 3.0}).scale > 0,
    ):
        assert 0 < sides.sum() < len(sides)


def test_every_method_and_form_of_the_table_is_tested() -> None:
    assert {(choice.method.name, choice.form) for choice in choices()} == {c[:2] for c in CASES}


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


@pytest.mark.parametrize("name", NAMES)
def test_sft_can_be_trained_on_any_folder(name: str) -> None:
    logits, models = random_models(seed=4)
    parameters = PARAMETERS[name][0]
    targets = folder_targets(name, "live", parameters, models)
    ones = torch.ones_like(targets.trust)
    hard = replace(targets, trust=ones, weights=ones)
    objective = objective_of(folder_settings(name, "live", parameters), "sft")
    loss, gradient = loss_and_gradient(objective, logits, hard)
    expected = -models.at_observed(models.p).log().sum()
    torch.testing.assert_close(loss.sum.detach(), expected, **EXACT)
    torch.testing.assert_close(gradient, models.p - models.one_hot, **EXACT)
    assert loss.error_bounds is None


def test_the_error_is_bounded_for_live_mixtures_and_the_divergences_alone() -> None:
    logits, models = random_models(count=5)
    for case in CASES:
        loss = objective_for(*case)(logits, folder_targets(*case, models))
        is_bounded = case[:2] in MIXTURES or case[0] in DIVERGENCES
        assert (loss.error_bounds is not None) == is_bounded
