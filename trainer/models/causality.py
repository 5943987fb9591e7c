"""Whether a model predicts each token from the tokens before it, tried on a few tokens.

Scores and losses hold only for such models. BERT, for example, loads as a causal language model and
attends to both sides; the logits of ProphetNet depend on the length of the batch.

T tokens of a row, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from ...pipeline.errors import UserError, one_line

_KEPT, _CHANGED = 4, 4  # tokens of the trial
_LEAST_LEAK = 0.1  # of a change of earlier logits, as a share of that of later ones


@torch.no_grad()
def check_causal(name: str, model: Any) -> None:
    """Raises UserError where later tokens or padding change logits of a model, or it cannot run.

    Three rows of a batch have the same first tokens; then come some, others, and padding. The
    largest difference of the first logits must be nothing beside that of the others, but for
    rounding: that of the logits, and that of experts, whose products have other shapes.
    """
    was_training = model.training
    model.eval()
    try:
        alone_TV, logits_3TV = _trial(model)
    except Exception as error:  # the code of each architecture raises its own errors
        raise UserError(
            f"model {name}: a {type(model).__name__} that does not run on token ids alone: "
            f"{one_line(error)}: give a causal language model"
        ) from error
    finally:
        model.train(was_training)
    earlier = (logits_3TV[0] - logits_3TV[1])[:_KEPT].abs().max()
    later = (logits_3TV[0] - logits_3TV[1])[_KEPT:].abs().max()
    eps = torch.finfo(logits_3TV.dtype).eps
    rounding = min(4 * eps * logits_3TV.abs().max(), _LEAST_LEAK * later)
    if earlier > max(rounding, max(1e-5, 2 * eps) * later):
        raise UserError(
            f"model {name}: is not a causal language model: in its {type(model).__name__} later "
            "tokens change the logits of earlier ones: give a model that is"
        )
    if (logits_3TV[:, :_KEPT] - alone_TV).abs().max() > _LEAST_LEAK * later:
        raise UserError(
            f"model {name}: its {type(model).__name__} has other logits in a longer or padded "
            "batch, which would be wrong: give another model"
        )


def _trial(model: Any) -> tuple[Tensor, Tensor]:
    """The logits of the first tokens alone, [T, V], and those of the three rows, [3, T, V]."""
    own = torch.arange(_KEPT + _CHANGED, device=model.device)
    is_kept = own < _KEPT
    rows_3T = torch.stack([own, torch.where(is_kept, own, own + _CHANGED), own * is_kept])
    mask_3T = torch.stack([own >= 0, own >= 0, is_kept]).long()
    alone = model(input_ids=own[None, :_KEPT], use_cache=False).logits[0]
    return alone, model(input_ids=rows_3T, attention_mask=mask_3T, use_cache=False).logits
