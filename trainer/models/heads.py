"""The output heads that the fused loss supports, recognised by what they compute.

A head is a linear layer whose logits may be scaled and softly capped. The form is not taken from
the model's name: a few tokens go through the model and through each candidate, and the candidate
that gives the model's own logits is taken. The small logits of a new model do not show a cap, so
the input of the head is tried as it is and multiplied to reach the cap. If several candidates fit,
it is the one that the configuration describes most fully; if none does, the plain loss runs.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loss.head import Head, chunks

_PROBE_TOKENS = 4
_TIMES_CAP = 16
# names of scales in configurations
_SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
)


@dataclass(frozen=True, slots=True)
class HeadForm:
    """The form of a head: scale and softcap of the output of the last linear layer."""

    scale: float = 1.0
    softcap: float | None = None

    def head(self, model: Any) -> Head:
        """The model's head as it is now."""
        layer = causal_model(model).get_output_embeddings()
        return Head(layer.weight, layer.bias, self.scale, self.softcap)


def causal_model(model: Any) -> Any:
    """The causal language model, without the wrapper of its adapters if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """The input of the head, [B, T, D]. Without `use_cache` among the inputs, nothing is cached."""
    return decoder_of(model)(**{"use_cache": False} | inputs).last_hidden_state


def decoder_of(model: Any) -> Any:
    """The layers below the head, where a model has them apart; a part may have parts (Llama 4)."""
    outer = causal_model(model)
    while (inner := outer.get_decoder()) is not outer and hasattr(inner, "get_decoder"):
        outer = inner
    # the causal language model of Llama 4 calls itself its decoder
    return getattr(outer, "model", outer) if inner is outer else inner


def logits_of(model: Any, inputs: dict[str, Tensor], rows_N: Tensor, columns_N: Tensor) -> Tensor:
    """The model's own logits at some positions of a batch, [N, V].

    The output head runs on their columns alone where the model's forward takes `logits_to_keep`.
    """
    columns_C, place_of_N = columns_N.unique(return_inverse=True)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_BCV = model(**inputs, use_cache=False, logits_to_keep=columns_C).logits
    else:
        logits_BCV = model(**inputs, use_cache=False).logits[:, columns_C]
    return logits_BCV[rows_N, place_of_N]


def logit_chunks(
    model: Any, form: HeadForm | None, inputs: dict[str, Any], rows_N: Tensor, columns_N: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The logits at some positions of a batch, in chunks: the rows of each, and logits [n, V].

    They are float32 at least. With a known form the head runs on these positions alone; without
    one, there is a single chunk.
    """
    if form is None:
        logits_NV = logits_of(model, inputs, rows_N, columns_N)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        yield slice(0, len(rows_N)), logits_NV.to(wide)
        return
    head, layer = form.head(model), causal_model(model).get_output_embeddings()
    hidden_ND = hidden_states(model, **inputs)[rows_N, columns_N]
    for rows in chunks(len(hidden_ND), len(head.weight), hidden_ND.device):
        yield rows, head.from_scores(layer(hidden_ND[rows]))


@torch.no_grad()
def recognise(model: Any) -> HeadForm | None:
    """The form of the model's head, or None where no candidate gives the model's own logits."""
    causal = causal_model(model)
    layer = causal.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear) or decoder_of(causal) is causal:
        return None
    was_training = model.training
    model.eval()
    try:
        forms, dtype = [*_candidates(causal.config.get_text_config())], layer.weight.dtype
        input_ids = torch.arange(_PROBE_TOKENS, device=layer.weight.device)[None]
        hidden = hidden_states(model, input_ids=input_ids)
        errors = dict.fromkeys(forms, 0.0)
        for factor in (1.0, _factor(layer(hidden), max(form.softcap or 0 for form in forms))):
            own = _multiplied(causal, layer, input_ids, factor)
            for form in forms:
                logits = form.head(model).logits(hidden * factor)
                errors[form] = max(errors[form], _relative_error(logits, own.float()))
    except Exception:  # a different architecture: its code may raise anything
        return None
    finally:
        model.train(was_training)
    rounding = max(1e-4, 4 * torch.finfo(dtype).eps)  # of logits in the model's own type
    limit = min(rounding, 2 * min(errors.values()) + 1e-6)
    return next((form for form, error in errors.items() if error <= limit), None)


def _factor(scores: Tensor, softcap: float) -> float:
    """A power of 2, which rounds nothing, that makes the largest score some times the cap."""
    largest = float(scores.abs().max().clamp(min=1e-30))
    return 2.0 ** math.ceil(math.log2(_TIMES_CAP * softcap / largest)) if softcap else 1.0


def _multiplied(causal: Any, layer: torch.nn.Linear, input_ids: Tensor, factor: float) -> Tensor:
    """The model's own logits where the input of its head is multiplied."""
    hook = layer.register_forward_pre_hook(lambda _, given: (given[0] * factor,))
    try:
        return causal(input_ids=input_ids, use_cache=False).logits
    finally:
        hook.remove()


def _relative_error(logits: Tensor, own: Tensor) -> float:
    """The largest error as a share of the largest logit; infinite if the shapes differ."""
    if logits.shape != own.shape:
        return float("inf")
    return float((logits - own).abs().max() / own.abs().max().clamp(min=1e-30))


def _candidates(config: Any) -> Iterator[HeadForm]:
    """The forms that the configuration names, the most specific first, then the plain head."""
    softcap = getattr(config, "final_logit_softcapping", None)
    values = [float(value) for name in _SCALES if (value := getattr(config, name, None))]
    scales = [scale for value in values for scale in (value, 1 / value)] + [1.0]
    for scale in dict.fromkeys(scales):
        if softcap:
            yield HeadForm(scale, float(softcap))
        yield HeadForm(scale)
