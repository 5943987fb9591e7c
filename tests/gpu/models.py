"""Models with the dimensions of real ones and random weights."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .parts import Bench

TOKENIZER = Path(os.environ.get("QPIPE_GPU_TOKENIZER", ".cache/SmolLM2-135M-Instruct"))
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SHARED = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
DIMENSIONS: dict[str, dict[str, Any]] = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
_SMALL = {  # of a rehearsal
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 49280,
    "max_position_embeddings": 4096,
}
_SHARPNESS = 6.0  # standard deviation of the logits


def without_weights(bench: Bench, size: str) -> Path:
    """A folder with the configuration and the demo's tokenizer, for an engine's dummy weights."""
    folder = bench.work / f"model-{size}"
    folder.mkdir(exist_ok=True)
    config = _SHARED | DIMENSIONS[size] | (_SMALL if bench.rehearse else {})
    (folder / "config.json").write_text(json.dumps(config))
    for name in _TOKENIZER_FILES:
        if (TOKENIZER / name).exists():
            shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def with_weights(bench: Bench, size: str, seed: int = 0) -> Path:
    """A folder with random weights as well, made on the GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = without_weights(bench, size)
    folder = bench.work / f"model-{size}-{seed}"
    if (folder / "model.safetensors").exists():
        return folder
    shutil.copytree(base, folder, dirs_exist_ok=True)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        randomize(model)
    model.save_pretrained(folder, max_shard_size="40GB")
    return folder


def randomize(model: Any) -> None:
    """Random weights under which no token has nearly all or nearly equal probability.

    The norm before the head gives its input H values of size 1, so the logits' standard deviation
    is that of the head's weights times the square root of H; the norm's own weight brings it to
    `_SHARPNESS`.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.fill_(1.0)
        norm = model.model.norm.weight
        norm.fill_(_SHARPNESS / (0.02 * norm.numel() ** 0.5))
