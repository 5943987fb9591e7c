"""Whether a model can be trained on packed examples, tried on a small pack."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from ...data.segments import segments_of
from ..heads import causal_model
from .packed_attention import packed_attention

_NAME = "qpipe-packed"
# supported by the packed attention; others attend to chunks, or pass a state from token to token
_LAYERS = {"full_attention", "sliding_attention"}
_OWN = {"sdpa", "eager"}  # attentions of transformers that the packed one replaces
_WINDOW = 3  # tokens of a window while packing is tried, fewer than an example of the pack has


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Give a model the packed attention; False, with the model unchanged, if it mixes examples.

    It is tried on a pack, whose logits must equal the model's own for each example alone. A model
    may get its window from the mask of its own attention, which the packed one does not read. So
    every window has a few tokens while it is tried: what applies it shows.
    """
    causal = causal_model(model)
    own = causal.config._attn_implementation
    if unsupported_attention(model):
        return False
    AttentionInterface.register(_NAME, packed_attention)
    was_training = model.training
    model.eval()
    try:
        with _short_windows(causal):
            stays_apart = _tried(causal)
    except Exception:  # a different architecture: its code may raise anything
        stays_apart = False
    finally:
        model.train(was_training)
    if not stays_apart:
        causal.set_attn_implementation(own)
    return stays_apart


def unsupported_attention(model: Any) -> str | None:
    """What of a model's configuration the packed attention does not compute, in words."""
    config = causal_model(model).config
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _LAYERS
    if kinds:
        return f"it has layers of {' and '.join(sorted(kinds))}"
    own = config._attn_implementation
    return None if own in _OWN else f"its attention is {own}"


def _tried(causal: Any) -> bool:
    """Whether the logits of a pack are those of its examples; leaves the packed attention on."""
    examples = torch.tensor(
        [[0, 1, 2, 3, 4, 5, 2, 7], [0, 1, 4, 3, 2, 6, 4, 1]], device=causal.device
    )
    both = torch.cat([examples[0], examples[1, 2:]])[None]
    places = torch.tensor([[*range(8), *range(2, 8)]], device=causal.device)
    alone = causal(input_ids=examples, use_cache=False).logits
    causal.set_attn_implementation(_NAME)
    segments = segments_of((2, 6, 6)).to(causal.device)
    packed = causal(input_ids=both, position_ids=places, segments=segments, use_cache=False).logits
    return torch.allclose(packed[0], torch.cat([alone[0], alone[1, 2:]]), 1e-4, 1e-4)


@contextmanager
def _short_windows(causal: Any) -> Iterator[None]:
    """Sets every window of the configuration and of the layers to a few tokens for a while."""
    config = causal.config.get_text_config()
    holders = [config, *causal.modules()]
    windows = [
        (holder, name, value)
        for holder in holders
        for name, value in vars(holder).items()
        if _is_window(name, value)
    ]
    for holder, name, _ in windows:
        setattr(holder, name, _WINDOW)
    try:
        yield
    finally:
        for holder, name, value in windows:
            setattr(holder, name, value)


def _is_window(name: str, value: object) -> bool:
    """Whether an attribute is the size of a window, such as `sliding_window`."""
    is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return is_size and "window" in name and "layer" not in name and "pattern" not in name
