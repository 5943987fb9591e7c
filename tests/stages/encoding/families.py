"""Small templates that imitate what public families do to turns, calls, results and reasoning."""

from .chats import byte_tokenizer

NAMES = [
    *("user", "assistant", "system", "tool", "begin", "stop", "end", "return", "call", "/call"),
    *("result", "/result", "results", "/results", "think", "/think", "quiet", "message"),
    *("channel", "observation", "turn"),
]
SPECIAL = ["[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALL]", "[RESULT]", "[/RESULT]"]
TOKENIZER = byte_tokenizer(bos_token="<s>", eos_token="</s>")
TOKENIZER.add_special_tokens(
    {"additional_special_tokens": SPECIAL + [f"<|{name}|>" for name in NAMES]}  # pyright: ignore
)

PROMPT = "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"

# Command R, tiny-aya: two end tokens in a row.
TWO_ENDS = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|assistant|><|begin|>' + m.content + '<|stop|><|end|>' }}
{%- else -%}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|><|begin|>' }}{%- endif -%}"""

# Apertus, Apriel: the last turn has no end.
OPEN_LAST = (
    """{%- for m in messages -%}
{{ '<|' + m.role + '|>' + m.content }}
{%- if not (loop.last and m.role == 'assistant') -%}{{ '<|end|>' }}{%- endif -%}
{%- endfor -%}"""
    + PROMPT
)

# gpt-oss: the last turn has an end of its own; a result names its call; reasoning before the last
# answer is dropped, and the generation prompt ends before the channel.
CHANNELS = """{%- set ns = namespace(name=none, final=false) -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and not m.tool_calls -%}{%- set ns.final = true -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{%- if m.thinking and m.content -%}{{ raise_exception('one of thinking and content') }}{%- endif -%}
{%- if (m.thinking or m.content) and not ns.final -%}
{{ '<|begin|>assistant<|channel|>think<|message|>' + (m.thinking or m.content) + '<|end|>' }}
{%- endif -%}
{%- set ns.name = m.tool_calls[0].function.name -%}
{{ '<|begin|>assistant to=' + ns.name + '<|channel|>tool<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'assistant' -%}
{%- if m.thinking and loop.last -%}
{{ '<|begin|>assistant<|channel|>think<|message|>' + m.thinking + '<|end|>' }}
{%- endif -%}
{{ '<|begin|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}
{%- elif m.role == 'tool' -%}
{%- if ns.name is none -%}{{ raise_exception('a result without a call') }}{%- endif -%}
{{ '<|begin|>' + ns.name + ' to=assistant<|message|>' + m.content | tojson + '<|end|>' }}
{%- else -%}{{ '<|begin|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|begin|>assistant' }}{%- endif -%}"""

# Gemma 4: results stand within the turn of their call, before its content; the arguments are
# sorted; each call is followed by what begins a result; the prompt has an empty thought.
WITHIN = """{%- for m in messages if m.role != 'tool' -%}
{%- set before = messages[messages.index(m) - 1].role if messages.index(m) else '' -%}
{%- if m.role != 'assistant' or before != 'tool' -%}{{ '<|turn|>' + m.role + '\\n' }}{%- endif -%}
{%- if m.reasoning -%}{{ '<|think|>' + m.reasoning + '<|/think|>' }}{%- endif -%}
{%- for c in m.tool_calls or [] -%}
{{ '<|call|>' + c.function.name }}
{%- for k, v in c.function.arguments | dictsort -%}{{ ' ' + k + '=' + v | string }}{%- endfor -%}
{{ '<|/call|>' }}
{%- endfor -%}
{%- if m.tool_calls -%}
{%- set ns = namespace(on=true, any=false) -%}
{%- for r in messages[messages.index(m) + 1:] -%}
{%- set ns.on = ns.on and r.role == 'tool' -%}
{%- if ns.on -%}
{%- set ns.any = true -%}
{{ '<|result|>response:' + m.tool_calls[0].function.name + ' ' + r.content + '<|/result|>' }}
{%- endif -%}
{%- endfor -%}
{%- if not ns.any -%}{{ '<|result|>' }}{%- endif -%}
{%- endif -%}
{{ m.content | trim }}
{%- if not m.tool_calls -%}{{ '<|end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}
{{ '<|turn|>assistant\\n<|think|><|/think|>' }}
{%- endif -%}"""

# DeepSeek V3 and R1: the end of the results stands before the answer; arguments must be text, and
# the content of a call None; the prompt opens reasoning that no turn shows.
TEXT_CALLS = """{%- set ns = namespace(results=false, first=true) -%}
{{ '<s>' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|user|>' + m.content }}{%- set ns.results = false -%}
{%- elif m.role == 'system' -%}{{ m.content }}
{%- elif m.role == 'tool' -%}
{{ '<|results|>' if not ns.results else '' }}{{ '<|result|>' + m.content + '<|/result|>' }}
{%- set ns.results = true -%}
{%- elif m.content is none -%}
{{ '<|assistant|>' if not ns.results else '' }}
{%- for c in m.tool_calls -%}
{{ '<|call|>' + c.function.name + ' ' + c.function.arguments + '<|/call|>' }}
{%- endfor -%}
{{ '</s>' }}
{%- elif ns.results -%}
{{ '<|/results|>' + m.content + '</s>' }}{%- set ns.results = false -%}
{%- else -%}{{ '<|assistant|>' + m.content.split('</think>')[-1] + '</s>' }}{%- endif -%}
{%- endfor -%}
{%- if ns.results -%}{{ '<|/results|>' }}
{%- elif add_generation_prompt -%}{{ '<|assistant|><think>\\n' }}{%- endif -%}"""

# Mistral: no generation prompt, tools before the last question, content beside calls left out.
INSTRUCT = """{%- set ns = namespace(want='user', last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- if m.role in ('user', 'assistant') and not m.tool_calls -%}
{%- if m.role != ns.want -%}{{ raise_exception('roles must take turns') }}{%- endif -%}
{%- set ns.want = 'assistant' if m.role == 'user' else 'user' -%}
{%- endif -%}
{%- endfor -%}
{{ '<s>' }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.index0 == ns.last -%}
{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}
{%- endif -%}
{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'tool' -%}{{ '[RESULT]' + m.content + '[/RESULT]' }}
{%- elif m.tool_calls -%}
{{ '[CALL]' }}{%- for c in m.tool_calls -%}{{ c.function | tojson }}{%- endfor -%}{{ '</s>' }}
{%- else -%}{{ ' ' + m.content + '</s>' }}{%- endif -%}
{%- endfor -%}"""

# Qwen3.5: refuses what has no question, and opens the reasoning of the last turn in the prompt.
THINKS = """{%- set ns = namespace(question=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not (m.content.startswith('<result>')) -%}
{%- set ns.question = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- if ns.question < 0 -%}{{ raise_exception('there is no question') }}{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' -%}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set thought = m.reasoning_content or '' -%}
{%- if '</think>' in m.content -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.question -%}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif -%}
{{ content }}
{%- for c in m.tool_calls or [] -%}
{{ '<call>' + c.function.name }}
{%- for k, v in c.function.arguments | items -%}{{ '<' + k + '>' + v | string }}{%- endfor -%}
{{ '</call>' }}
{%- endfor -%}
{%- else -%}{{ m.content }}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""

# Llama 3.1 and 4: one call, results as text in quotation marks, everything trimmed.
ONE_CALL = """{%- for m in messages -%}
{%- set role = 'ipython' if m.role == 'tool' else m.role -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls is defined -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one call at a time') }}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{ '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- elif m.role == 'tool' -%}{{ m.content | tojson }}
{%- else -%}{{ m.content | trim }}{%- endif -%}
{{ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}"""

# Command R7B: every rendering ends with the generation prompt, asked for or not.
ALWAYS = """{%- for m in messages -%}
{{ '<|turn|>' + m.role }}
{%- if m.tool_calls -%}
{{ '<|think|>' + (m.reasoning_content or '') + '<|/think|>' }}
{%- for c in m.tool_calls -%}
{{ '<|call|>' + c.function.name + c.function.arguments | tojson + '<|/call|>' }}
{%- endfor -%}
{%- elif m.role == 'assistant' -%}{{ '<|message|>' + m.content + '<|stop|>' }}
{%- else -%}{{ m.content }}{%- endif -%}
{{ '<|end|>' }}
{%- endfor -%}
{{ '<|turn|>assistant' }}"""

# Apriel: the last turn is open and its calls have no ids; a prompt that no turn repeats is written
# after each question, asked for or not.
IDS = """{%- for m in messages -%}
{{ '\n<|' + m.role + '|>\n' + m.content }}
{%- set last = loop.last -%}
{%- for c in m.tool_calls or [] -%}
{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{%- if not last -%}{{ ', "id": "' + c.id + '"' }}{%- endif -%}{{ '}' }}
{%- endfor -%}
{%- if m.role == 'assistant' and not last -%}{{ '\n<|end|>' }}{%- endif -%}
{%- if last and m.role != 'assistant' -%}{{ '\n<|assistant|>\nMy thoughts:\n' }}{%- endif -%}
{%- endfor -%}"""

# GLM: turns have no end, and results an opening of their own.
NO_ENDS = """{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|observation|>\\n' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' }}
{{- '<result>' + m.content + '</result>' }}
{%- else -%}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endif -%}
{%- for c in m.tool_calls or [] -%}
{{ '<call>' + c.function.name + c.function.arguments | tojson + '</call>' }}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

# Models that see pictures: contents are read as lists of parts only.
PARTS = """{%- for m in messages -%}
{{ '<|' + m.role + '|>' }}
{%- for part in m.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{{ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""

# SmolLM2, Phi 3, Gemma 3: calls are not shown.
PLAIN = """{%- for m in messages -%}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""

# TRL's: what the model writes stands between marks, here without the end and with a header.
MARKED = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- generation -%}{{ 'model: ' + m.content }}{%- endgeneration -%}{{ '<|end|>' }}
{%- else -%}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}"""
