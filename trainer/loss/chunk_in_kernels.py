"""The loss of a chunk of supervised positions and its gradient, by the kernels.

A live method reads the student's logits. A first kernel summarises them: the logits of the support
and the log-sum-exp of all others. This is a student over a vocabulary of S + 1 words, the last of
which stands for everything outside the support, and the rules of the live targets run on it as
they are.

n positions of the chunk, D hidden size, V vocabulary, W its width in memory, S entries of the
widest support.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from ...pipeline.methods import rules
from ...pipeline.methods.definition import OF_WHOLE, Choice
from ..data.batch import SparseTargets
from .chunk_in_torch import masses
from .head import Head
from .objective import LiveTargets, live_targets
from .sparse import TailShape

_HAS_TRITON = find_spec("triton") is not None


def has_kernels(device: torch.device, dtype: torch.dtype, live: Choice | None) -> bool:
    """Whether the kernels run on a device in a type and compute a method.

    They compute all but gem, and what reads the whole distribution of the student.
    """
    if not _HAS_TRITON or (live is not None and _needs_torch(live)):
        return False
    from . import kernels

    return device.type in kernels.DEVICES and dtype in kernels.DTYPES


def _needs_torch(live: Choice) -> bool:
    return live.residual == "gem" or bool(live.method.reads & OF_WHOLE)


def loss_and_gradient_(
    hidden_nD: Tensor,
    scores_nW: Tensor,
    head: Head,
    targets: SparseTargets,
    frozen: tuple[Tensor, Tensor],
    tail_shape: TailShape,
    live: Choice | None,
    known: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return weight·loss [n], the error bounds [n], and the gradient of the raw scores, [n, V].

    The gradient is a view of `scores_nW`. `frozen` are the `masses` of the targets, `live` and
    `known` are as in `chunk_in_torch`.
    """
    from . import kernels

    scores_nV = head.write_scores(hidden_nD, scores_nW)
    bounds_n = own_n = None
    if live is not None:
        followed = _live_targets(live, scores_nW, scores_nV, head, targets, known)
        targets, bounds_n, own_n = followed.targets, followed.error_bounds, followed.losses
        frozen = masses(targets, scores_nV.shape[1])
    losses_n = kernels.loss_and_gradient_(
        scores_nW,
        head,
        targets.support_ids,
        targets.support_mask,
        *frozen,
        targets.weights,
        is_uniform=tail_shape == "uniform",
    )
    if own_n is not None:
        losses_n = targets.weights * own_n
    return losses_n, bounds_n, scores_nV


def scaled_(values: Tensor, factor: Tensor) -> Tensor:
    """`values` times a factor on their device, in place, without a pass over memory if it is 1."""
    if not has_kernels(values.device, values.dtype, None):
        return values.mul_(factor)
    from . import kernels

    return kernels.scale_(values, factor)


def _live_targets(
    live: Choice,
    scores_nW: Tensor,
    scores_nV: Tensor,
    head: Head,
    targets: SparseTargets,
    known: dict[str, Tensor],
) -> LiveTargets:
    """The targets of a live method."""
    from . import kernels

    ids, mask = targets.support_ids, targets.support_mask
    support_nS, outside_n, entropy_n = kernels.summarise(scores_nW, head, ids, mask)
    summary_nE = torch.cat([support_nS, outside_n[:, None]], 1)
    if "entropy" in live.method.reads:
        known = known | {"entropy": _entropy(summary_nE, entropy_n)}
    if "top_entropy" in live.method.reads:
        size = min(rules.TOP_ENTROPY_SIZE, scores_nV.shape[1])
        top_nk = head.from_scores(scores_nV.topk(size, dim=1).values)
        known = known | {"top_entropy": rules.renormalised_entropy(top_nk)}
    short = live_targets(live, summary_nE, _renumbered(targets), **known)
    own = replace(short.targets, support_ids=ids, observed_ids=targets.observed_ids)
    return replace(short, targets=own)


def _entropy(summary_nE: Tensor, outside_entropy_n: Tensor) -> Tensor:
    """The student's entropy over the whole vocabulary, [n], from its summary."""
    log_probs_nE = summary_nE.log_softmax(1)
    return rules.entropy(log_probs_nE) + log_probs_nE[:, -1].exp() * outside_entropy_n


def _renumbered(targets: SparseTargets) -> SparseTargets:
    """The same targets with the place in the support as the id."""
    is_observed_nS = (targets.support_ids == targets.observed_ids[:, None]) & targets.support_mask
    observed_n = is_observed_nS.int().argmax(1)
    places_S = torch.arange(targets.support_ids.shape[1], device=observed_n.device)
    ids_nS = torch.where(targets.support_mask, places_S, observed_n[:, None])
    return replace(targets, support_ids=ids_nS, observed_ids=observed_n)
