"""Attention for packed examples: each attends to its own tokens and to their common beginning.

Examples with a common beginning, such as chats under one system prompt, are packed with it once;
its hidden states are those that each example would have alone, and its gradient is the sum of
theirs. Attention runs once an example, so a pack costs no more than its parts.

H heads, H_k those of keys and values, d size of a head, T tokens of the pack, Q and K of a part.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .heads import causal_model

_NAME = "qpipe-packed"
# supported by the mask below; others attend to chunks, or pass a state from token to token
_LAYERS = {"full_attention", "sliding_attention"}


def packed_attention(
    module: torch.nn.Module,
    query_1HTd: Tensor,
    key_1HTd: Tensor,
    value_1HTd: Tensor,
    attention_mask: None,
    segments: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer; its output is [1, T, H, d].

    `segments` are the lengths of the common beginning, possibly 0, and of the rest of each example.
    """
    assert attention_mask is None  # transformers makes none for an attention of this name
    lengths = list(segments or query_1HTd.shape[2:3])
    split = (states.split(lengths, dim=2) for states in (query_1HTd, key_1HTd, value_1HTd))
    beginning, *others = zip(*split, strict=True)
    _, first_key, first_value = beginning
    parts = [beginning] if lengths[0] else []
    parts += [
        (q, torch.cat([first_key, k], 2), torch.cat([first_value, v], 2)) for q, k, v in others
    ]
    outputs = [
        sdpa_attention_forward(
            module, q, k, v, _seen(q, k, sliding_window), dropout=dropout, scaling=scaling
        )[0]
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1), None


def _seen(query_1HQd: Tensor, key_1HKd: Tensor, window: int | None) -> Tensor | None:
    """The causal mask of queries at the last places over the keys, [Q, K]; None is plain causal."""
    queries, keys = query_1HQd.shape[2], key_1HKd.shape[2]
    if queries == keys and (window is None or keys <= window):
        return None
    place_K = torch.arange(keys, device=key_1HKd.device)
    place_Q1 = place_K[keys - queries :, None]
    seen_QK = place_K <= place_Q1
    return seen_QK if window is None else seen_QK & (place_K > place_Q1 - window)


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Give a model this attention; False, with the model unchanged, if it would mix the examples.

    It is tried on a pack, whose logits must equal the model's own for each example alone.
    """
    causal = causal_model(model)
    layers = getattr(causal.config.get_text_config(), "layer_types", None) or ()
    if causal.config._attn_implementation != "sdpa" or not _LAYERS.issuperset(layers):
        return False
    AttentionInterface.register(_NAME, packed_attention)
    was_training = model.training
    model.eval()
    examples = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 4, 3, 2]], device=causal.device)
    both = torch.cat([examples[0], examples[1, 2:]])[None]
    places = torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4]], device=causal.device)
    try:
        alone = causal(input_ids=examples, use_cache=False).logits
        causal.set_attn_implementation(_NAME)
        packed = causal(
            input_ids=both, position_ids=places, segments=(2, 3, 3), use_cache=False
        ).logits
        stay_apart = torch.allclose(packed[0], torch.cat([alone[0], alone[1, 2:]]), 1e-4, 1e-4)
    except Exception:  # a different architecture: its code may raise anything
        stay_apart = False
    finally:
        model.train(was_training)
    if not stay_apart:
        causal.set_attn_implementation("sdpa")
    return stay_apart
