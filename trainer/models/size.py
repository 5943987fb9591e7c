"""The size of a model, from its files, without loading it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError, one_line
from ...pipeline.storage.json_files import read_json
from .files import ModelFiles

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# names in configurations of the experts of a layer, and of the experts that a token uses
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_MET = "num_experts_per_tok"


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """The number of a model's weights, and of those that are multiplied for each token."""

    stored: int
    multiplied: float


def weight_bytes(model: ModelFiles, dtype: str) -> int:
    """Bytes of the weights in `dtype`; for quantised weights, the size of their files.

    Without files on this machine, the number of weights comes from the configuration; 0 for an
    architecture that transformers lacks. Raises UserError where a file is damaged.
    """
    files = _safetensors(model)
    others = [path for kind in ("*.bin", "*.pt") for path in model.folder.glob(kind)]
    if not files and not others:
        counts = count_weights(model)
        return counts.stored * VALUE_BYTES[dtype] if counts else 0
    if not files or getattr(model.config, "quantization_config", None) is not None:
        return sum(path.stat().st_size for path in files or others)
    return sum(_values(model, path) for path in files) * VALUE_BYTES[dtype]


def _safetensors(model: ModelFiles) -> list[Path]:
    """The files that transformers loads; some folders hold the same weights twice."""
    there = sorted(model.folder.glob("*.safetensors"))
    whole, index = (model.folder / f"model.safetensors{end}" for end in ("", ".index.json"))
    if whole in there:
        return [whole]
    if not index.exists():
        return there
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model {model.name}: {index.name} is damaged: fetch it again") from error
    return [path for path in there if path.name in names]


def tensor_names(model: ModelFiles) -> set[str]:
    """The names of the tensors in the files that transformers loads."""
    return {name for path in _safetensors(model) for name in _shapes(model, path)}


def _values(model: ModelFiles, path: Path) -> int:
    """The number of values in a file of weights."""
    return sum(map(prod, _shapes(model, path).values()))


def _shapes(model: ModelFiles, path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a file of weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model {model.name}: {path.name} cannot be read: {one_line(error)}: fetch it again"
        ) from error


def count_weights(model: ModelFiles) -> WeightCounts | None:
    """The weights of a model's configuration; None where transformers lacks its architecture.

    An embedding that is not tied to the output head is not multiplied; of the experts of a mixture
    model, those that the router chooses are.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes without memory
            made = AutoModelForCausalLM.from_config(model.config)
    except Exception:  # the code of each architecture raises its own errors
        return None
    embedding, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
    stored, multiplied = 0, 0.0
    for name, weight in made.named_parameters():
        stored += weight.numel()
        if weight is not embedding or embedding is head:
            multiplied += weight.numel() * (_share_met(model) if ".experts." in name else 1)
    return WeightCounts(stored, multiplied)


def forward_flop(model: ModelFiles, multiplied: float, lengths: Mapping[int, int]) -> float:
    """Floating-point operations of a forward pass over sequences; `lengths` maps tokens to number.

    Two for each weight and token, and, in every layer and head, four for each dimension of the head
    and each earlier token: two for its key, two for its value.
    """
    config = model.config.get_text_config()
    width = config.num_hidden_layers * config.num_attention_heads * _head_size(config)
    return sum(
        number * (2 * length * multiplied + 4 * width * length * (length + 1) / 2)
        for length, number in lengths.items()
    )


def kv_cache_bytes(model: ModelFiles, dtype: str) -> int:
    """Bytes of keys and values of a token, as full attention in every layer would have them."""
    config = model.config.get_text_config()
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * key_heads * _head_size(config) * VALUE_BYTES[dtype]


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _share_met(model: ModelFiles) -> float:
    config = model.config.get_text_config()
    experts = next((found for name in _EXPERTS if (found := getattr(config, name, None))), 1)
    return min(1.0, getattr(config, _EXPERTS_MET, experts) / experts)
