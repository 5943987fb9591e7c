"""A model without weights: a configuration, and a tokenizer of bytes."""

from functools import cache
from pathlib import Path
from typing import Any

from .inputs import folder_until_exit

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(SPECIAL)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    made.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


@cache
def model() -> Path:
    """A model folder with a file of weights that nobody loads."""
    import numpy as np
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    folder = folder_until_exit() / "tiny"
    LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=256).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    save_file({"weight": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    return folder
