"""The keys and values of a beginning that several examples share, computed once.

Only a model whose every layer attends to all earlier tokens is used so: its cache then holds the
keys and values of each token, and nothing else. B examples of a batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....trainer.models.heads import decoder_of

_TRIED, _SHARED = 9, 5  # tokens of the trial
_TOLERANCE = 1e-4  # in units of the largest value, or of the number format


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """The keys and values of some tokens, [1, heads, tokens, size], by layer."""

    layers: list[tuple[Tensor, Tensor]]

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2]

    def inputs(self, count: int) -> dict[str, Any]:
        """What a model takes to go on after the beginning in each of `count` rows."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for index, pair in enumerate(self.layers):
            cache.update(*(each.expand(count, -1, -1, -1) for each in pair), index)
        return {"past_key_values": cache, "use_cache": True}


def beginning_of(model: Any, input_ids_T: Tensor) -> Beginning | None:
    """What a model computes of its first tokens; None where that is not keys and values alone."""
    from transformers.cache_utils import DynamicLayer

    cache: Any = decoder_of(model)(input_ids=input_ids_T[None], use_cache=True).past_key_values
    layers = getattr(cache, "layers", None) or ()
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    return Beginning([(layer.keys, layer.values) for layer in layers])


@torch.inference_mode()
def keeps_beginnings(model: Any) -> bool:
    """Whether a model goes on after a beginning as if it had run whole, tried on a few tokens."""
    rows_2T = torch.arange(2 * _TRIED, device=model.device).view(2, _TRIED)
    rows_2T[1, :_SHARED] = rows_2T[0, :_SHARED]
    try:
        beginning = beginning_of(model, rows_2T[0, :_SHARED])
        if beginning is None:
            return False
        whole = decoder_of(model)(input_ids=rows_2T, use_cache=False)
        rest = decoder_of(model)(input_ids=rows_2T[:, _SHARED:], **beginning.inputs(2))
    except Exception:  # a different architecture: its code may raise anything
        return False
    expected = whole.last_hidden_state[:, _SHARED:]
    error = (rest.last_hidden_state - expected).abs().max()
    rounding = max(_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)
    return bool(error <= rounding * expected.abs().max())
