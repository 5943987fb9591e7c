"""Whether a model predicts each token from the tokens before it, tried on a few tokens.

Scores and losses hold only for such models. BERT, for example, loads as a causal language model and
attends to both sides.
"""

from typing import Any

import torch

from ...pipeline.errors import UserError, one_line

_KEPT, _CHANGED = 4, 4  # tokens of the trial


@torch.no_grad()
def check_causal(name: str, model: Any) -> None:
    """Raises UserError where later tokens change the logits of a model, or it cannot run.

    Two rows of a batch differ in their last tokens. The largest difference of the logits before
    them must be nothing beside that of the others, but for the rounding of experts, whose products
    have other shapes.
    """
    own = torch.arange(_KEPT + _CHANGED)
    other = torch.where(own < _KEPT, own, own + _CHANGED)
    was_training = model.training
    model.eval()
    try:
        rows = torch.stack([own, other]).to(model.device)
        logits_2TV = model(input_ids=rows, use_cache=False).logits
    except Exception as error:  # the code of each architecture raises its own errors
        raise UserError(
            f"model {name}: a {type(model).__name__} that does not run on token ids alone: "
            f"{one_line(error)}: give a causal language model"
        ) from error
    finally:
        model.train(was_training)
    moved_TV = (logits_2TV[0] - logits_2TV[1]).abs()
    limit = max(1e-5, 2 * torch.finfo(logits_2TV.dtype).eps)
    if moved_TV[:_KEPT].max() > limit * moved_TV[_KEPT:].max():
        raise UserError(
            f"model {name}: is not a causal language model: in its {type(model).__name__} later "
            "tokens change the logits of earlier ones: give a model that is"
        )
