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
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "bert": {"is_decoder": True},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "shared_intermediate_size": 24,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """The architectures whose configuration is that of a text model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **given: Any) -> Any:
    """The configuration of a tiny model."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    if default.get_text_config() is not default:
        raise ValueError("nested")
    own = OWN.get(model_type, {})
    known = set(vars(default)) | set(default.attribute_map)
    return kind(**{k: v for k, v in _SMALL.items() if k in known} | own | given)


def tiny_model(model_type: str, **given: Any) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **given)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    assert size < 10_000_000, size
    return AutoModelForCausalLM.from_config(config)


def in_folder(model: Any, folder: Path) -> ModelFiles:
    """Save a model with a tokenizer."""
    model.save_pretrained(folder)
    words = WordLevel({f"w{index}": index for index in range(VOCAB_SIZE)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return find_model(str(folder))
