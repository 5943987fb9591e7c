"""Chat templates that imitate well-known families, small tokenizers, and what is supervised.

With the tokenizer of single bytes and special tokens, the decoded supervised tokens are exactly the
supervised characters.
"""

import numpy as np
from qpipe.stages.demonstrations.demonstration import Demonstration
from qpipe.stages.encoding.encoder import Encoded, Encoder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<start_of_turn>", "<end_of_turn>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
]

CHATML = """{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA3 = """{{ '<|begin_of_text|>' }}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}"""

MISTRAL = """{{ '<s>' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'tool' -%}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls -%}{{ '[TOOL_CALLS]' + m.tool_calls[0].name + '</s>' }}
{%- elif loop.nextitem is defined and loop.nextitem.role == 'tool' -%}
{{ raise_exception('a result without a call') }}
{%- else -%}{{ ' ' + m.content + '</s>' }}
{%- endif -%}
{%- endfor -%}"""

GEMMA = """{{ '<s>' }}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

# Reasoning is dropped before the last question, and written, empty if need be, after it.
QWEN3 = """{%- set ns = namespace(question=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- set content = m.content -%}
{%- if m.role == 'assistant' -%}
{%- set reasoning = m.reasoning_content or '' -%}
{%- if '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.question -%}
{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
{{ content }}
{%- for call in m.tool_calls or [] -%}{{ '<call>' + call.name + '</call>' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# The generation prompt opens the reasoning, which no turn of the conversation then shows.
DEEPSEEK = """{{ '<s>' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|User|>' + m.content }}
{%- else -%}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\\n' }}{%- endif -%}"""

GLM = """{{ '[gMASK]<sop>' }}
{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

PLAIN = """{%- for m in messages -%}
{{ ('### Instruction:\\n' if m.role == 'user' else '### Response:\\n') + m.content + '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"""


def byte_tokenizer(**special_tokens):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    return _finished(tokenizer, **special_tokens)


def _finished(tokenizer, **special_tokens):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def merging_tokenizer(trim_offsets):
    """Byte-level BPE that has learnt whole words, with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["yes yes it is good good day hello hello world assistant user\n\n\n"] * 3,
        trainers.BpeTrainer(
            vocab_size=340,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _finished(tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZER = byte_tokenizer(bos_token="<s>", eos_token="</s>")
MERGING_TOKENIZERS = [merging_tokenizer(trim_offsets) for trim_offsets in (False, True)]


def chat(*turns, **fields):
    """A demonstration; the turns are the user's and the assistant's by turns, or whole messages."""
    roles = ("user", "assistant")
    messages = [
        turn if isinstance(turn, dict) else {"role": roles[i % 2], "content": turn}
        for i, turn in enumerate(turns)
    ]
    return Demonstration("demo", messages, fields.get("tools"), "chats.jsonl", 7)


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def encoder(template, tokenizer=TOKENIZER, max_length=10_000, **options):
    return Encoder(tokenizer, template, max_length=max_length, **options)


def encode(template, demonstration, **options):
    encoded = encoder(template, **options).encode(demonstration)
    assert isinstance(encoded, Encoded), encoded
    return encoded.example


def stretches(example, tokenizer=TOKENIZER):
    """The text of each run of supervised tokens."""
    breaks = np.flatnonzero(np.diff(example.positions) > 1) + 1
    return [tokenizer.decode(example.input_ids[run]) for run in np.split(example.positions, breaks)]


def supervised(template, *turns, **options):
    return stretches(encode(template, chat(*turns), **options))
