"""What a run uses of a model and trains in it, in one line."""

import re
from collections import Counter
from typing import Any

import torch

from .attention.packing import unsupported_attention
from .heads import HeadForm, causal_model
from .student import Student

_ROUTER = re.compile(r"router|gating|\.gate\b", re.IGNORECASE)


def summary(student: Student, is_packed: bool, wants_packing: bool) -> str:
    """The trainable weights by kind, the attention, packing and head form, and why not others."""
    parts = _trained(student.model), _attention(student.model, is_packed, wants_packing)
    return "; ".join([*parts, _loss(student.head_form)])


def _trained(model: Any) -> str:
    """Their number by kind, and that of all weights."""
    counts = trained_weights(model)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"trains {counts.total():,} of {total:,} weights ({kinds})"


def trained_weights(model: Any) -> Counter[str]:
    """The number of trainable weights of each kind; those that are tied count once."""
    counts: Counter[str] = Counter()
    head, seen = model.get_output_embeddings(), set[torch.nn.Parameter]()
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                counts[_kind(f"{name}.{own}", module, module is head)] += parameter.numel()
    return counts


def _kind(name: str, module: torch.nn.Module, is_head: bool) -> str:
    described = f"{name} {type(module).__name__}"
    if "lora_" in name:
        return "adapters"
    if isinstance(module, torch.nn.Embedding):
        return "embeddings"
    if is_head:
        return "head"
    if _ROUTER.search(described):
        return "routers"
    is_expert = "expert" in described.lower() and "shared_expert" not in name
    return "experts" if is_expert else "dense"


def _attention(model: Any, is_packed: bool, wants_packing: bool) -> str:
    if is_packed:
        return "packed attention"
    own = causal_model(model).config._attn_implementation
    problem = unsupported_attention(model) or "packed demonstrations would not stay apart in it"
    reason = f"as {problem}" if wants_packing else "by --no-pack"
    return f"attention {own}, demonstrations padded {reason}"


def _loss(form: HeadForm | None) -> str:
    if form is None:
        return "plain loss, which takes more memory and time, as its output head is not recognised"
    scale = "" if form.scale == 1 else f" of scale {form.scale:g}"
    return f"fused loss{scale}" + (f" with soft cap {form.softcap:g}" if form.softcap else "")
