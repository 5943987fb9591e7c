"""Two real tokenizers that came with packages: SmolLM2's, byte-level, and Mistral's, sentencepiece.

Mistral's falls back to bytes, puts a blank in front, and ends a turn with another special token.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
SMOLLM = ROOT / ".cache" / "SmolLM2-135M-Instruct"
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} "
    "[/INST]{% else %} {{ message.content }}</s>{% endif %}{% endfor %}"
)


@cache
def smollm() -> Any:
    """The tokenizer of the demo's model."""
    return AutoTokenizer.from_pretrained(SMOLLM)


def save_mistral(folder: Path) -> Path:
    """A model folder with the tokenizer of Mistral 7B v0.1, without weights."""
    folder.mkdir(parents=True)
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copy(data / "tokenizer.model.v1", folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return folder
