"""Attention for packed examples: each attends to its own tokens and to their common beginning.

Examples with a common beginning, such as chats under one system prompt, are packed with it once;
its hidden states are those that each example would have alone, and its gradient is the sum of
theirs. On a GPU, in 16 bits, a pack is one call of flash attention for sequences of different
lengths; elsewhere attention runs once for each part.

H heads, H_k those of keys and values, d size of a head, T tokens of the pack, Q and K of a part.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...data.segments import Segments

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_MOST_IN_FLASH = 256  # size of a head
# until torch 2.12 fewer heads of keys and values need no argument
_IS_TOLD = "enable_gqa" in inspect.signature(varlen_attn).parameters
GROUPED: dict[str, Any] = {"enable_gqa": True} if _IS_TOLD else {}


def packed_attention(
    module: torch.nn.Module,
    query_1HTd: Tensor,
    key_1HTd: Tensor,
    value_1HTd: Tensor,
    attention_mask: None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer; its output is [1, T, H, d].

    Without `segments` all tokens are one example.
    """
    assert attention_mask is None  # transformers makes none for an attention of this name
    states = query_1HTd, key_1HTd, value_1HTd
    dtype = _dtype(query_1HTd)
    if segments is not None and runs_in_flash(query_1HTd, dtype, dropout, softcap):
        query, key, value = (each[0].transpose(0, 1).to(dtype) for each in states)  # [T, H, d]
        return _in_one_call(query, key, value, segments, sliding_window, scaling)[None], None
    options = sliding_window, dropout, scaling, softcap
    return _part_by_part(module, *states, segments, *options), None


def _dtype(query_1HTd: Tensor) -> torch.dtype:
    """The type in which attention multiplies: that of autocast if it is on."""
    kind = query_1HTd.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_1HTd.dtype


def runs_in_flash(
    query_1HTd: Tensor, dtype: torch.dtype, dropout: float, softcap: float | None
) -> bool:
    size = query_1HTd.shape[-1]
    fits = size <= _MOST_IN_FLASH and size % 8 == 0
    return query_1HTd.is_cuda and dtype in _FLASH_DTYPES and fits and not dropout and not softcap


def _in_one_call(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    segments: Segments,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """All parts in one call, [T, H, d]; the beginning's keys are repeated for each part."""
    if segments.keys is not None:
        key_THd, value_THd = (each.index_select(0, segments.keys) for each in (key_THd, value_THd))
    output: Any = varlen_attn(
        query_THd,
        key_THd,
        value_THd,
        segments.query_ends,
        segments.key_ends,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # of so many tokens to the left
        **GROUPED,
    )
    return output


def _each_part(
    module: torch.nn.Module,
    query_1HTd: Tensor,
    key_1HTd: Tensor,
    value_1HTd: Tensor,
    segments: Segments | None,
    window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """One call for each part, [1, T, H, d]."""
    lengths = segments.lengths if segments is not None else tuple(query_1HTd.shape[2:3])
    split = (states.split(lengths, dim=2) for states in (query_1HTd, key_1HTd, value_1HTd))
    beginning, *others = zip(*split, strict=True)
    _, first_key, first_value = beginning
    parts = [beginning] if lengths[0] else []
    parts += [
        (q, torch.cat([first_key, k], 2), torch.cat([first_value, v], 2)) for q, k, v in others
    ]
    given: dict[str, Any] = {"dropout": dropout, "scaling": scaling}
    attend = sdpa_attention_forward
    if softcap:
        attend, given = _capped_attention, given | {"softcap": softcap}
    outputs = [attend(module, q, k, v, _seen(q, k, window), **given)[0] for q, k, v in parts]
    return torch.cat(outputs, dim=1)


# not compiled, as the lengths differ in every pack
_part_by_part: Any = torch.compiler.disable(_each_part)


def _capped_attention(
    module: torch.nn.Module,
    query_1HQd: Tensor,
    key_1HKd: Tensor,
    value_1HKd: Tensor,
    seen_QK: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> tuple[Tensor, None]:
    """Attention whose scores are softcap·tanh(score/softcap), which no fused attention computes."""
    groups = query_1HQd.shape[1] // key_1HKd.shape[1]
    key_1HKd, value_1HKd = (each.repeat_interleave(groups, 1) for each in (key_1HKd, value_1HKd))
    scale = query_1HQd.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query_1HQd @ key_1HKd.mT * scale / softcap)
    if seen_QK is None:
        seen_QK = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.masked_fill(~seen_QK, -torch.inf).softmax(-1, dtype=torch.float32)
    weights = torch.nn.functional.dropout(weights.to(scores.dtype), dropout, module.training)
    return (weights @ value_1HKd).transpose(1, 2), None


def _seen(query_1HQd: Tensor, key_1HKd: Tensor, window: int | None) -> Tensor | None:
    """The causal mask of queries at the last places over the keys, [Q, K]; None is plain causal."""
    queries, keys = query_1HQd.shape[2], key_1HKd.shape[2]
    if queries == keys and (window is None or keys <= window):
        return None
    place_K = torch.arange(keys, device=key_1HKd.device)
    place_Q1 = place_K[keys - queries :, None]
    seen_QK = place_K <= place_Q1
    return seen_QK if window is None else seen_QK & (place_K > place_Q1 - window)
