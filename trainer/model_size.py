"""How much memory a model takes, told from its files without loading it."""

from .models import ModelFiles

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(model: ModelFiles, dtype: str) -> int:
    """Bytes of the weights in `dtype`; of quantised ones, those of their files."""
    from safetensors import safe_open

    files = sorted(model.folder.glob("*.safetensors"))
    if not files or getattr(model.config, "quantization_config", None) is not None:
        others = [path for kind in ("*.bin", "*.pt") for path in model.folder.glob(kind)]
        return sum(path.stat().st_size for path in files or others)
    values = 0
    for path in files:
        with safe_open(path, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                values += size
    return values * VALUE_BYTES[dtype]


def kv_cache_bytes(model: ModelFiles, dtype: str) -> int:
    """Bytes of keys and values of a token, as full attention in every layer would have them."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * head_size * VALUE_BYTES[dtype]
