"""Templates and tokenizers for token weights, and the weights by text.

With the tokenizer of single bytes, every token of plain English is one character. The templates
imitate what well-known families do to a content: keep it, trim it, drop a part of it, rewrite it.
"""

from itertools import groupby
from types import SimpleNamespace

import numpy as np
from qpipe.pipeline.format.records import Reject
from qpipe.stages.demonstrations.formats import parse_row
from qpipe.stages.encoding.encoder import Encoded, Encoder
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
END = "<|im_end|>"

PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
KEEPS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor -%}" + PROMPT
)
TRIMS = KEEPS.replace("m.content", "m.content | trim")
HIDES = KEEPS.replace("m.content", "m.content.split('</think>')[-1]")
SHOUTS = KEEPS.replace("m.content", "m.content | upper")
REPEATS = KEEPS.replace("m.content", "m.content + '|' + m.content")
LAST_TWO = KEEPS.replace("in messages", "in messages[-2:]")
CALLS = (  # Mistral: a turn that calls a tool shows no content
    "{%- for m in messages -%}{%- if m.tool_calls -%}{{ '<|assistant|>' + m.tool_calls[0].name }}"
    "{%- else -%}{{ '<|' + m.role + '|>' + m.content }}{%- endif -%}{{ '</s>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer)


def word_tokenizer(trim_offsets):
    """Byte-level BPE that has learnt whole words, with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, initial_alphabet=alphabet)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return finished(tokenizer)


def metaspace_tokenizer():
    """As SentencePiece does it: characters, composed, and a mark for the space before a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    train(tokenizer, special_tokens=["<unk>"])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return finished(tokenizer)


def train(tokenizer, **options):
    words = ["hello\nhello\nyes good day it is good day   hello world\n\n\nx   x"] * 3
    tokenizer.train_from_iterator(words, BpeTrainer(vocab_size=340, show_progress=False, **options))


def finished(tokenizer):
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BYTES = byte_tokenizer()
WORDS = word_tokenizer(trim_offsets=False)
TRIMMED_WORDS = word_tokenizer(trim_offsets=True)
TOKENIZERS = {
    "bytes": BYTES,
    "words": WORDS,
    "trimmed": TRIMMED_WORDS,
    "metaspace": metaspace_tokenizer(),
}


def user(content):
    return {"role": "user", "content": content}


def answer(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def encode(template, *messages, tokenizer=BYTES, max_length=10_000, **options):
    """The demonstration of a row of messages, encoded; or why it is rejected."""
    row = {"messages": list(messages)}
    demonstration = parse_row(SimpleNamespace(name="x.jsonl"), 1, row, "auto")
    if isinstance(demonstration, Reject):
        return demonstration.reason
    encoded = Encoder(tokenizer, template, max_length, **options).encode(demonstration)
    return encoded.reason if isinstance(encoded, Reject) else encoded


def told(template, *messages, tokenizer=BYTES, **options):
    """The text of each run of supervised tokens of one weight, and that weight."""
    encoded = encode(template, *messages, tokenizer=tokenizer, **options)
    assert isinstance(encoded, Encoded), encoded
    ids, weights = encoded.example.observed_ids, encoded.example.token_weights
    assert weights.dtype == np.float32
    assert weights.shape == ids.shape
    # A break in the positions ends a run also where the weight goes on.
    marks = zip(encoded.example.positions - np.arange(len(ids)), weights.tolist(), strict=True)
    runs = groupby(zip(marks, ids, strict=True), key=lambda pair: pair[0])
    return [(tokenizer.decode([id for _, id in run]), weight) for (_, weight), run in runs]


def refused(template, *messages, **options):
    reason = encode(template, *messages, **options)
    assert isinstance(reason, str), "not rejected"
    assert "\n" not in reason
    return reason
