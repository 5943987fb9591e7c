"""Tiny vision-language models."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .zoo import VOCAB_SIZE

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_IMAGE = {"image_token_id": 190, "video_token_id": 191}
_MARKS = {"vision_start_token_id": 192, "vision_end_token_id": 193}

CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "qwen2_5_vl": lambda: {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN, "fullatt_block_indexes": [1]},
        **_IMAGE,
        **_MARKS,
    },
    "qwen3_vl": lambda: {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_IMAGE,
        **_MARKS,
    },
    "qwen3_5": lambda: {
        "text_config": {
            **_TEXT,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
        },
        "vision_config": {**_QWEN, "num_position_embeddings": 16},
        **_IMAGE,
        **_MARKS,
    },
    "llava": lambda: {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_ENCODER},
        "image_token_index": 190,
    },
    "mistral3": lambda: {
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **_ENCODER},
        "image_token_index": 190,
    },
    "gemma3": lambda: {
        "text_config": {**_TEXT, "sliding_window": 5},
        "vision_config": _ENCODER,
        "mm_tokens_per_image": 4,
        "image_token_index": 190,
    },
    "llama4": lambda: {
        "text_config": {**_TEXT, "intermediate_size_mlp": 48, "num_local_experts": 4},
        "vision_config": {
            **_ENCODER,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
}


def tiny_vision_language_model(model_type: str) -> Any:
    """A tiny vision-language model with random weights."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**CONFIGS[model_type]())
    return AutoModelForImageTextToText.from_config(config)
