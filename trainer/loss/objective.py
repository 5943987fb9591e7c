"""The objective of a run: the method of its target folder, frozen or live.

A frozen target is read from the folder. A live one depends on the student as it trains: its trust,
scale and residual are computed from the logits of the step, without a gradient, by the same rules
as in build-targets; the values of the base or the teacher that they read are in the folder.

N supervised positions, V vocabulary, S entries of the widest support.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...pipeline.errors import UserError
from ...pipeline.folders.mixing import live_method, refuse_to_mix
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.methods import rules
from ...pipeline.methods.definition import OF_WHOLE, Choice
from ...pipeline.methods.divergences import Divergence
from ...pipeline.methods.rules import Signals
from ...pipeline.methods.table import choose
from ..data.batch import SparseTargets
from .sparse import TailShape, at_least_float32, complement_log_probs, target_losses, times

SFT = "sft"


@dataclass(frozen=True, slots=True)
class Loss:
    """A batch's Σ weight·loss, and a bound of the error of its gradient by a truncated support.

    `error_bounds` bounds ‖ĝ − g‖₁ at each position, ĝ the gradient with respect to the logits and g
    that of the full teacher, weights included; [N], None where truncation leaves the target alone.
    """

    sum: Tensor
    error_bounds: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """A method as the trainer minimises it."""

    choice: Choice
    tail_shape: TailShape
    residual: str  # of the folder
    tokens_alone: bool = False  # sft on targets of another method: `observed_only`

    @property
    def traits(self) -> dict[str, object]:
        """What all target folders of a run must agree in."""
        return {
            "live method": live_method(self.choice),
            "residual": self.residual,
            "tail shape": self.tail_shape,
        }

    @property
    def has_error_bounds(self) -> bool:
        """Whether a truncated support changes the gradient, by at most a known bound."""
        has_other = self.choice.method.divergence is not None or self.choice.residual == "mixture"
        return self.choice.reads_student and has_other

    @property
    def reads_examples(self) -> bool:
        """Whether the target at a position depends on its whole example."""
        return "sequence_log_ratio" in self.choice.method.reads

    def __call__(self, logits_NV: Tensor, targets: SparseTargets) -> Loss:
        """Σ weight·loss over the batch, to be divided by the supervised tokens of the step."""
        if self.choice.residual == "gem":
            losses = matching_losses(logits_NV, targets.observed_ids, self.choice)
            return Loss((targets.weights * losses).sum())
        live = self.followed(logits_NV.detach(), targets)
        losses = target_losses(logits_NV, live.targets, self.tail_shape)
        if live.losses is not None:  # of another value, but of the same gradient
            losses = live.losses + (losses - losses.detach())
        return Loss((live.targets.weights * losses).sum(), live.error_bounds)

    def followed(self, logits_NV: Tensor, targets: SparseTargets) -> "LiveTargets":
        """The targets at these logits."""
        if not self.choice.reads_student or self.choice.residual == "gem":
            return LiveTargets(targets)
        return live_targets(self.choice, logits_NV, targets)

    @property
    def has_trust(self) -> bool:
        """Whether the method has a γ, the trust in the observed token."""
        return self.choice.residual != "gem"

    def trust(self, logits_NV: Tensor, targets: SparseTargets) -> Tensor:
        """The method's γ at these logits, also where a live loss has it as a weight, [N]."""
        if not self.choice.reads_student:
            return targets.trust
        return self.choice.trust_and_scale(_signals(self.choice, logits_NV, targets))[0]


def objective_of(settings: dict[str, Any], method: str) -> Objective:
    """The objective that a target folder's settings describe, or plain "sft" on any folder.

    A folder stores the product of token weights and the method's weights, so sft on targets of
    another method ignores both; a folder made for sft has token weights alone.
    """
    if method == SFT:
        choice = choose(SFT, "live")
    else:
        choice = choose(settings["method"], settings["form"], settings["parameters"])
    tokens_alone = method == SFT != settings["method"]
    return Objective(choice, settings["tail_shape"], settings["residual"], tokens_alone)


def common_objective(folders: Sequence[SealedFolder], method: str | None = None) -> Objective:
    """The objective of a run on target folders: their own method, or "sft" on any folders.

    Raises UserError where a folder holds targets of another method, or the folders differ in what
    one run needs the same of.
    """
    found = []
    for folder in folders:
        own = folder.settings["method"]
        if method not in (None, SFT, own):
            raise UserError(
                f"{folder.path}: holds {own} targets: build targets for {method} first, with "
                f"`qpipe build-targets --method {method}` (only --method {SFT} trains on any "
                "folder)"
            )
        found.append(objective_of(folder.settings, method or own))
    for folder, objective in zip(folders, found, strict=True):
        refuse_to_mix(folders[0].path, found[0].traits, folder.path, objective.traits)
    return replace(found[0], tokens_alone=any(each.tokens_alone for each in found))


@dataclass(frozen=True, slots=True)
class LiveTargets:
    """The targets at a student's logits, the bounds of their error, and their losses.

    `losses` are None where they are the cross-entropies to the targets. Those of a divergence are
    not, and its targets may have negative entries; the gradients agree.
    """

    targets: SparseTargets
    error_bounds: Tensor | None = None  # [N], weights included
    losses: Tensor | None = None  # [N], without the weights


@torch.no_grad()
def live_targets(
    choice: Choice, logits_NV: Tensor, targets: SparseTargets, **known: Tensor
) -> LiveTargets:
    """The targets of a live method at the student's logits.

    `known` are the signals [N] that these logits do not determine: they may not cover whole
    examples, or have one entry for all that is outside the support.
    """
    logits_NV = at_least_float32(logits_NV)
    signals = replace(_signals(choice, logits_NV, targets), **known)
    trust_N, weight_N = choice.trust_and_weight(signals)
    live = replace(targets, trust=trust_N, weights=weight_N * targets.weights)
    if choice.method.divergence is not None:
        return _diverging(live, logits_NV, choice.method.divergence, choice.parameters)
    if choice.residual != "mixture":
        return LiveTargets(live)
    mixed = _mixed(live, logits_NV, *choice.mixing)
    return LiveTargets(mixed, 2 * mixed.weights * (1 - trust_N) * mixed.tail_mass)


def matching_losses(logits_NV: Tensor, observed_ids: Tensor, choice: Choice) -> Tensor:
    """gem's Σ_k a_k·(log p_k − log p_y), a without a gradient, [N]."""
    log_probs_NV = at_least_float32(logits_NV).log_softmax(1)
    vocabulary = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    is_observed_NV = vocabulary == observed_ids[:, None]
    pull_NV = rules.matching_weights(log_probs_NV.detach(), is_observed_NV, **choice.parameters)
    observed_N1 = log_probs_NV.gather(1, observed_ids[:, None])
    return times(pull_NV, log_probs_NV - observed_N1).sum(1)


def _signals(choice: Choice, logits_NV: Tensor, targets: SparseTargets) -> Signals:
    """The signals that the rules of the method read, from the student's logits."""
    reads = choice.method.reads
    log_norm_N = logits_NV.logsumexp(1)
    log_prob_N = logits_NV.gather(1, targets.observed_ids[:, None])[:, 0] - log_norm_N
    signals = Signals(log_prob=log_prob_N)
    if "entropy" in reads:
        log_probs_NV = logits_NV - log_norm_N[:, None]
        signals = replace(signals, entropy=rules.entropy(log_probs_NV))
    if "top_entropy" in reads:
        size = min(rules.TOP_ENTROPY_SIZE, logits_NV.shape[1])
        top_Nk = logits_NV.topk(size, dim=1).values
        signals = replace(signals, top_entropy=rules.renormalised_entropy(top_Nk))
    if reads & OF_WHOLE:
        signals = replace(signals, **_of_whole(reads, logits_NV - log_norm_N[:, None], log_prob_N))
    if choice.stored == "base-observed":
        base_N = stored_log_prob(targets).to(log_prob_N.dtype)
        ratio_N = example_means(log_prob_N - base_N, targets.example_of)
        signals = replace(signals, base_log_prob=base_N, sequence_log_ratio=ratio_N)
    return signals


def _of_whole(reads: frozenset[str], log_probs_NV: Tensor, log_prob_N: Tensor) -> dict[str, Tensor]:
    """The signals, among those read, of the student's whole distribution."""
    compute = {
        "concentration": lambda: rules.concentration(log_probs_NV),
        "rank": lambda: rules.rank(log_probs_NV, log_prob_N),
        "expected_rank": lambda: rules.expected_rank(log_probs_NV),
    }
    return {name: compute[name]() for name in reads & OF_WHOLE}


def stored_log_prob(targets: SparseTargets) -> Tensor:
    """log b(y) of a folder that holds the base's probability of the observed token, [N]."""
    is_observed_NS = targets.support_ids == targets.observed_ids[:, None]  # 0 at the padding
    return torch.where(is_observed_NS, targets.support_probs, 0).sum(1).log()


def example_means(values_N: Tensor, example_of_N: Tensor) -> Tensor:
    """Each position's mean of the values over its example, whose positions are consecutive, [N]."""
    # numbered anew: there are at most as many as positions, so nothing is read from the device
    changes_N = (example_of_N != example_of_N.roll(1)).cumsum(0)
    group_of_N = changes_N - changes_N[:1]
    sums = torch.zeros_like(values_N).index_add(0, group_of_N, values_N)
    counts = torch.zeros_like(values_N).index_add(0, group_of_N, torch.ones_like(values_N))
    return (sums / counts)[group_of_N]


def _diverging(
    targets: SparseTargets, logits_NV: Tensor, divergence: Divergence, parameters: dict[str, Any]
) -> LiveTargets:
    """The targets of a divergence from q, the stored residual; the tails are one outcome."""
    p_NE, q_NE = _outcomes(targets, logits_NV)
    # rounding can leave q 1e-8 of mass outside a support that is the whole vocabulary
    q_NE[:, -1] = torch.where(p_NE[:, -1] > -torch.inf, q_NE[:, -1], -torch.inf)
    losses_N, target_NE = divergence(p_NE, q_NE, parameters)
    bounds_N = targets.weights * divergence.bound(p_NE[:, -1], q_NE[:, -1], parameters)
    steering = replace(targets, support_probs=target_NE[:, :-1], tail_mass=target_NE[:, -1])
    return LiveTargets(steering, bounds_N, losses_N)


def _mixed(targets: SparseTargets, logits_NV: Tensor, eta: float, alpha: float) -> SparseTargets:
    """The targets whose residual is the mixture of p and q, where q is the stored residual."""
    p_NE, q_NE = _outcomes(targets, logits_NV)
    mixed_NS, mixed_tail_N = rules.mixture(
        p_NE[:, :-1], p_NE[:, -1], q_NE[:, :-1], q_NE[:, -1], eta, alpha
    )
    return replace(targets, support_probs=mixed_NS.exp(), tail_mass=mixed_tail_N.exp())


def _outcomes(targets: SparseTargets, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the student and log q of the stored residual, [N, E] each.

    The outcomes are the ids of the support, −inf at its padding, and the tail.
    """
    log_norm_N = logits_NV.logsumexp(1)
    p_NS = logits_NV.gather(1, targets.support_ids) - log_norm_N[:, None]
    p_tail_N = complement_log_probs(logits_NV, targets) - log_norm_N
    q_NS, q_tail_N = targets.support_probs.log(), targets.tail_mass.log()

    def outcomes(of_support_NS: Tensor, of_tail_N: Tensor) -> Tensor:
        known_NS = torch.where(targets.support_mask, of_support_NS, -torch.inf)
        return torch.cat([known_NS, of_tail_N[:, None]], 1).to(log_norm_N)

    return outcomes(p_NS, p_tail_N), outcomes(q_NS, q_tail_N)
