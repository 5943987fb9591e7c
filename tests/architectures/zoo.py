"""Tiny models of the architectures that transformers has for causal language models.

Configurations name their sizes in few ways, so one table of small values fits most of them; what
an architecture needs besides is in `OWN`. Windows and soft caps are small enough to act.
"""

from pathlib import Path
from typing import Any

import torch
from qpipe.trainer.models.files import ModelFiles, find_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 200
_HIDDEN, _INNER, _LAYERS, _HEADS, _PLACES, _EXPERTS = 32, 48, 4, 4, 128, 4
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), _HIDDEN),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), _INNER
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS
    ),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), _PLACES),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 5),
    "use_sliding_window": True,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
_LATENT = {"num_key_value_heads": _HEADS}  # of attention with latent keys and values
_MIXED = ["sliding_attention", "full_attention"] * 2
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"), _LATENT),
    "youtu": _LATENT,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _MIXED},
    "gptj": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "git": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "shared_intermediate_size": 24,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "roc_bert": {
        **dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), 8),
        **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCAB_SIZE),
    },
    "xmod": {"languages": ["en"], "default_language": "en"},
    "mamba2": {"head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
}


# why an architecture is not examined here
LEFT_OUT = {
    # with images or sound, and parts that each need a configuration (vision.py examines some)
    **dict.fromkeys(("emu3", "gemma3", "gemma3n", "gemma4", "gemma4_unified"), "parts"),
    **dict.fromkeys(("got_ocr2", "llama4", "mllama", "phi4_multimodal"), "parts"),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), "parts"
    ),
    "blt": "parts for bytes",
    # they need the hidden states of another model
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "assistants"),
    # their configurations are hard to make small: sections of positions, sets of indexers
    **dict.fromkeys(("cohere_compass_text", "qwen4_exp_text"), "sizes"),
    "reformer": "it refuses to compute gradients without its random hashes and dropout",
    "zamba": "transformers refuses the tied weights of a small one",
}


def model_types() -> list[str]:
    """The architectures of text models that transformers has."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - LEFT_OUT.keys())


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    known = {*vars(default), *default.attribute_map}
    small = {name: value for name, value in _SMALL.items() if name in known}
    return kind(**small | OWN.get(model_type, {}))


# with others a ReLU of CTRL is so near 0 that rounding decides whether it has a gradient
_SEEDS = {"ctrl": 2}


def tiny_model(model_type: str) -> Any:
    """A tiny model with random weights and the plain attention, which leaves nothing out."""
    torch.manual_seed(_SEEDS.get(model_type, 0))
    config = tiny_config(model_type)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def in_folder(model: Any, folder: Path) -> ModelFiles:
    """Save a model with a tokenizer."""
    model.save_pretrained(folder)
    words = WordLevel({f"w{index}": index for index in range(VOCAB_SIZE)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return find_model(str(folder))
