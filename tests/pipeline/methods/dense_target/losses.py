"""The losses of the papers, as autograd differentiates them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from .cases import Parameters

Tensor = torch.Tensor


@dataclass(frozen=True)
class Losses:
    """What a published loss reads: logits with a gradient, and constants."""

    logits: Tensor  # [B, T, V]
    base: Tensor
    teacher: Tensor
    observed: Tensor
    mask: Tensor
    given: Parameters

    @property
    def log_probs(self) -> Tensor:
        return torch.log_softmax(self.logits, -1)

    def at_observed(self, log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, self.observed[..., None])[..., 0]

    @property
    def nll(self) -> Tensor:
        return functional.cross_entropy(self.logits.movedim(-1, 1), self.observed, reduction="none")

    @property
    def prob(self) -> Tensor:
        """p_y, with its gradient."""
        return torch.softmax(self.logits, -1).gather(-1, self.observed[..., None])[..., 0]

    @property
    def base_prob(self) -> Tensor:
        return self.at_observed(self.base.exp())

    def divergence_from(self, log_target: Tensor) -> Tensor:
        """KL(target ‖ p)."""
        return functional.kl_div(self.log_probs, log_target, log_target=True, reduction="none").sum(
            -1
        )

    def divergence_to(self, log_other: Tensor) -> Tensor:
        """KL(p ‖ other)."""
        return (self.log_probs.exp() * (self.log_probs - log_other)).sum(-1)

    @property
    def reverse_divergence(self) -> Tensor:
        return self.divergence_to(self.teacher)

    def cross_entropy_to(self, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            self.logits.movedim(-1, 1), target.detach().movedim(-1, 1), reduction="none"
        )


def eaft_loss(at: Losses) -> Tensor:
    top = torch.topk(at.logits.detach(), min(20, at.logits.shape[-1])).values
    return (torch.distributions.Categorical(logits=top).entropy() / 3.0) ** at.given["a"] * at.nll


def iw_sft_loss(at: Losses) -> Tensor:
    log_ratio = at.at_observed(at.log_probs.detach()) - at.at_observed(at.base)
    weight = torch.exp(at.given["T"] * log_ratio.mean(-1, keepdim=True)).clamp(0, 16)
    return weight * at.nll


def psft_loss(at: Losses) -> Tensor:
    """PPO's clipped surrogate with an advantage of 1."""
    ratio = at.prob / at.base_prob
    return -torch.minimum(ratio, ratio.clamp(1 - 0.2, 1 + at.given["eps_hi"]))


def gem_loss(at: Losses) -> Tensor:
    """−Σ_k a_k·(log p_y − log p_k), a without gradient."""
    pull = torch.softmax(at.logits / at.given["beta"], -1)
    if at.given["h"] == "logsigmoid":
        observed_logit = at.logits.gather(-1, at.observed[..., None])
        pull = pull * torch.sigmoid(0.01 * (at.logits - observed_logit))
    margin = at.at_observed(at.log_probs)[..., None] - at.log_probs
    return -(pull.detach() * margin).sum(-1)


def target_sft_loss(at: Losses) -> Tensor:
    eta = at.given["eta"]
    mixture = torch.softmax((1 - eta) * at.log_probs + eta * at.teacher, -1)
    trust = at.prob[..., None]
    return at.cross_entropy_to(
        trust * functional.one_hot(at.observed, mixture.shape[-1]) + (1 - trust) * mixture
    )


def gift_loss(at: Losses) -> Tensor:
    raised = at.base + at.given["beta"] * functional.one_hot(at.observed, at.base.shape[-1])
    return at.cross_entropy_to(torch.softmax(raised, -1))


def flow_loss(at: Losses) -> Tensor:
    losses = -at.at_observed(at.base)
    tau = at.given.get("tau", torch.quantile(losses.flatten(), 0.5).item())
    return torch.exp(-losses / tau) * at.nll


def token_cleaning_loss(at: Losses) -> Tensor:
    excess = (at.at_observed(at.teacher) - at.at_observed(at.base)).flatten()
    if "threshold" in at.given:
        kept = torch.nonzero(excess >= at.given["threshold"])[:, 0]
    else:
        kept = torch.argsort(excess, descending=True)[: int(len(excess) * at.given["keep"])]
    keep = torch.zeros_like(excess)
    keep[kept] = 1.0
    return keep.view(at.nll.shape) * at.nll


def contrast_loss(at: Losses) -> Tensor:
    teacher = at.teacher.exp()
    in_head = teacher >= at.given["alpha"] * teacher.max(-1, keepdim=True).values
    target = torch.where(in_head, teacher / at.base.exp(), 0.0)
    informative = functional.kl_div(at.base, at.teacher, log_target=True, reduction="none").sum(-1)
    selected = (informative >= at.given["beta"]).to(teacher.dtype)
    return selected * at.cross_entropy_to(target / target.sum(-1, keepdim=True))


def idft_loss(at: Losses) -> Tensor:
    prob = at.prob.detach()
    entropy_ = torch.distributions.Categorical(logits=at.logits.detach()).entropy()
    power = torch.exp(-(prob.log() + entropy_) / at.given["beta"]).clip(0.1, 2)
    return prob**power * at.nll


def jsd_loss(at: Losses) -> Tensor:
    """As GKD and TRL have it: KL of both from the mixture, or one KL at either end."""
    beta, teacher = at.given["beta"], at.teacher.exp()
    if beta in (0, 1):
        return at.divergence_from(at.teacher) if beta == 0 else at.reverse_divergence
    mixture = (beta * teacher + (1 - beta) * at.log_probs.exp()).log()
    of_teacher = (teacher * (at.teacher - mixture)).sum(-1)
    return beta * of_teacher + (1 - beta) * at.divergence_to(mixture)


def skew_loss(at: Losses) -> Tensor:
    alpha, teacher = at.given["alpha"], at.teacher.exp()
    mixture = (alpha * teacher + (1 - alpha) * at.log_probs.exp()).log()
    return (teacher * (at.teacher - mixture)).sum(-1)


def skew_reverse_loss(at: Losses) -> Tensor:
    alpha = at.given["alpha"]
    return at.divergence_to((alpha * at.log_probs.exp() + (1 - alpha) * at.teacher.exp()).log())


def prift_mass_loss(at: Losses) -> Tensor:
    """The base's probabilities in ascending order, added up to the observed one's."""
    probs, ids = torch.sort(at.base.exp(), -1)
    place = (ids == at.observed[..., None]).to(torch.int64).argmax(-1, keepdim=True)
    up_to = probs.cumsum(-1).gather(-1, place)[..., 0]
    return (up_to >= at.given["tau"]) * at.nll


def infosft_loss(at: Losses) -> Tensor:
    prob = at.prob.detach()
    at_end = torch.logit(torch.tensor(at.given["P"], dtype=prob.dtype))
    return prob * torch.relu(1 - torch.logit(prob) / at_end) * at.nll


def deft_loss(at: Losses) -> Tensor:
    """(1 − p_y^α)/α at a constant α = e^(−Rényi entropy of order 2)."""
    power = torch.softmax(at.logits.detach(), -1).square().sum(-1)
    return (1 - at.prob**power) / power


def talr_loss(at: Losses) -> Tensor:
    losses = -at.at_observed(at.base)
    tau = at.given.get("tau", torch.quantile(losses.flatten(), 0.5).item())
    return (-at.nll.detach() / tau).exp().clamp(min=at.given["floor"]) * at.nll


def ranktuner_loss(at: Losses) -> Tensor:
    order = torch.argsort(at.logits.detach(), -1, descending=True)
    ranks = torch.arange(1, order.shape[-1] + 1).double()
    own = ((order == at.observed[..., None]) * ranks).sum(-1)
    expected = (torch.softmax(at.logits.detach(), -1).gather(-1, order) * ranks).sum(-1)
    indicator = 2 ** (1 / (1 + own).log2() - 1 / (1 + expected).log2())
    return at.prob.detach() ** at.given["power"] / indicator * at.nll


def selected_loss(at: Losses, values: Tensor) -> Tensor:
    """kd at the positions of the highest values."""
    chosen = values >= at.given.get("threshold", math.inf)
    if "threshold" not in at.given:
        best = values.flatten().topk(math.ceil(values.numel() * at.given["keep"])).indices
        chosen.view(-1)[best] = True
    return chosen * at.divergence_from(at.teacher)


def amid_loss(at: Losses) -> Tensor:
    """KL of the student from the mixture, which has no gradient."""
    eta, power = at.given["eta"], (1 - at.given["alpha"]) / 2
    p, q = at.log_probs.exp().detach(), at.teacher.exp()
    if power == 0 or eta in (0, 1):
        mixed = p ** (1 - eta) * q**eta
    else:
        mixed = ((1 - eta) * p**power + eta * q**power) ** (1 / power)
    return at.cross_entropy_to(mixed / mixed.sum(-1, keepdim=True))


def uncertainty(at: Losses) -> Tensor:
    return torch.distributions.Categorical(logits=at.base).entropy()


LOSSES: dict[str, Callable[[Losses], Tensor]] = {
    "sft": lambda at: at.nll,
    "dft": lambda at: at.prob.detach() * at.nll,
    "beyond-log": lambda at: (1 - at.prob ** at.given["alpha"]) / at.given["alpha"],
    "profit": lambda at: (at.prob.detach() >= at.given["tau"]) * at.nll,
    "eaft": eaft_loss,
    "iw-sft": iw_sft_loss,
    "cft": lambda at: at.mask * at.nll,
    "label-smoothing": lambda at: functional.cross_entropy(
        at.logits.movedim(-1, 1), at.observed, label_smoothing=at.given["lam"], reduction="none"
    ),
    "sft+kl": lambda at: at.nll + at.given["lam"] * at.divergence_from(at.base),
    "asft": lambda at: at.prob.detach() * at.nll + at.given["lam"] * at.divergence_from(at.base),
    "psft": psft_loss,
    "gem": gem_loss,
    "kd": lambda at: at.divergence_from(at.teacher),
    "kd-hybrid": lambda at: (
        (1 - at.given["lam"]) * at.nll + at.given["lam"] * at.divergence_from(at.teacher)
    ),
    "target-sft": target_sft_loss,
    "reverse-kl": lambda at: at.reverse_divergence,
    "mixed-kl": lambda at: (
        (1 - at.given["lam"]) * at.divergence_from(at.teacher)
        + at.given["lam"] * at.reverse_divergence
    ),
    "jsd": jsd_loss,
    "skew-kl": skew_loss,
    "skew-reverse-kl": skew_reverse_loss,
    "gift": gift_loss,
    "flow": flow_loss,
    "stm": lambda at: (at.base_prob >= at.given["tau"]) * at.nll,
    "token-cleaning": token_cleaning_loss,
    "contrast": contrast_loss,
    "idft": idft_loss,
    "trsft": lambda at: (at.prob.detach() / at.given["tau"]).clamp(max=1.0) * at.nll,
    "prift-prob": lambda at: at.base_prob * at.nll,
    "prift-mass": prift_mass_loss,
    "infosft": infosft_loss,
    "deft": deft_loss,
    "talr": talr_loss,
    "ranktuner": ranktuner_loss,
    "se-kd": lambda at: selected_loss(at, uncertainty(at)),
    "tip": lambda at: selected_loss(
        at, uncertainty(at) + (at.teacher.exp() * (at.teacher - at.base)).sum(-1)
    ),
    "amid": amid_loss,
}
