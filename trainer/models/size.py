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
_METHOD_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}
_SCALE_BITS = 0.25  # of a weight: 8 for each 32 weights in MXFP4, less elsewhere


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """The number of a model's weights, and of those that are multiplied for each token."""

    stored: int
    multiplied: float
    embeddings: int = 0  # of those stored: the embedding and the head


def weight_bytes(model: ModelFiles, dtype: str) -> int | None:
    """Bytes of the weights in `dtype`; for quantised weights, the size of their files.

    Without files on this machine, the number of weights comes from the configuration; None for an
    architecture that transformers lacks. Raises UserError where a file is damaged.
    """
    files = _safetensors(model)
    others = [path for kind in ("*.bin", "*.pt") for path in model.folder.glob(kind)]
    if not files and not others:
        counts = count_weights(model)
        return _bytes_of(counts, model, dtype) if counts else None
    if not files or _quantization(model) is not None:
        return sum(path.stat().st_size for path in files or others)
    return sum(_values(model, path) for path in files) * VALUE_BYTES[dtype]


def _bytes_of(counts: WeightCounts, model: ModelFiles, dtype: str) -> int:
    """Embeddings are not quantised; of an unknown way, the weights count as if they were not."""
    bits = _stored_bits(_quantization(model) or {}) or 8 * VALUE_BYTES[dtype]
    return int(
        counts.embeddings * VALUE_BYTES[dtype] + (counts.stored - counts.embeddings) * bits / 8
    )


def _quantization(model: ModelFiles) -> Any:
    return getattr(model.config, "quantization_config", None)


def _stored_bits(quantization: Any) -> float | None:
    """Bits of a quantised weight with its scale; None if the configuration does not tell."""
    bits = quantization.get("bits") or _METHOD_BITS.get(quantization.get("quant_method"))
    for option, width in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        bits = bits or (width if quantization.get(option) else None)
    for group in (quantization.get("config_groups") or {}).values():
        bits = bits or (group.get("weights") or {}).get("num_bits")
    return bits + _SCALE_BITS if bits else None


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
    made = _made_without_memory(model.config)
    if made is None:
        return None
    embedding, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
    embeddings = embedding.numel() + (0 if head is embedding else head.numel())
    stored, multiplied = 0, 0.0
    for name, weight in made.named_parameters():
        stored += weight.numel()
        if weight is not embedding or embedding is head:
            multiplied += weight.numel() * (_share_met(model) if ".experts." in name else 1)
    return WeightCounts(stored, multiplied, embeddings)


def _made_without_memory(config: Any) -> Any:
    """A model of shapes alone; None where transformers lacks its architecture."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                return kind.from_config(config)
        except Exception:  # the code of each architecture raises its own errors
            continue
    return None


def forward_flop(model: ModelFiles, multiplied: float, lengths: Mapping[int, int]) -> float:
    """Floating-point operations of a forward pass over sequences; `lengths` maps tokens to number.

    Two for each weight and token, and, in every layer and head, four for each dimension of the head
    and each earlier token: two for its key, two for its value.
    """
    config = model.config.get_text_config()
    width = config.num_hidden_layers * attention_heads(config) * _head_size(config)
    return sum(
        number * (2 * length * multiplied + 4 * width * length * (length + 1) / 2)
        for length, number in lengths.items()
    )


def kv_cache_bytes(model: ModelFiles, dtype: str, parts: int = 1) -> int:
    """Bytes of keys and values of a token on each of `parts` GPUs that share every layer.

    As full attention in every layer would have them; 0 without attention. Each GPU keeps at least
    one head, and all of the latent vector where attention has one (MLA).
    """
    config = model.config.get_text_config()
    heads, latent = attention_heads(config), getattr(config, "kv_lora_rank", None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    of_layer = 2 * max(1, key_heads // parts) * _head_size(config) if heads else 0
    of_layer = latent + config.qk_rope_head_dim if latent else of_layer
    return config.num_hidden_layers * of_layer * VALUE_BYTES[dtype]


def attention_heads(config: Any) -> int:
    """The heads of a layer; 0 without attention."""
    return getattr(config, "num_attention_heads", None) or 0


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // (attention_heads(config) or 1)


def _share_met(model: ModelFiles) -> float:
    config = model.config.get_text_config()
    experts = next((found for name in _EXPERTS if (found := getattr(config, name, None))), 1)
    return min(1.0, getattr(config, _EXPERTS_MET, experts) / experts)
