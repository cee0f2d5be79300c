"""Chat templates of the kinds that models are published with, written here: what a template can do to a
conversation, and how each marks and ends a turn."""

import copy
from typing import Any, NamedTuple


class Family(NamedTuple):
    template: str
    specials: tuple[str, ...]  # its special tokens, apart from <s> and </s>


CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# The same, with marks around what the assistant says.
MARKED = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# Headers, trimmed contents, a system turn that is always there, tools in the first user turn, one call only.
LLAMA3 = """\
{{- bos_token -}}
{%- macro head(role) -%}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}{%- set rest = messages -%}
{%- endif -%}
{{ head('system') + 'Cutting date\n\n' + system + '<|eot_id|>' }}
{%- for m in rest -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one tool call at a time') }}{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{ head('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|eot_id|>' }}
{%- elif m.role == 'tool' -%}
{{ head('ipython') + (m.content | tojson) + '<|eot_id|>' }}
{%- elif m.role == 'user' and loop.first and tools -%}
{{ head('user') + 'Functions:\n' }}
{%- for tool in tools -%}{{ (tool | tojson) + '\n' }}{%- endfor -%}
{{ (m.content | trim) + '<|eot_id|>' }}
{%- else -%}
{{ head(m.role) + (m.content | trim) + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ head('assistant') }}{%- endif -%}
"""

# Thinking only after the last question, and always in the last turn; results of tools as turns of the user.
QWEN3 = """\
{%- if tools -%}
{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content + '\n\n' }}{%- endif -%}
{{ '<tools>' }}{%- for tool in tools -%}{{ '\n' + (tool | tojson) }}{%- endfor -%}
{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif -%}
{%- set ns = namespace(question=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'assistant' -%}
{%- set thought = m.reasoning_content or '' -%}
{%- set said = m.content -%}
{%- if not thought and '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.question and (loop.last or thought) -%}
{{ '<think>\n' + thought + '\n</think>\n\n' }}
{%- endif -%}
{{ said }}
{%- for call in m.tool_calls or [] -%}
{%- if said or not loop.first -%}{{ '\n' }}{%- endif -%}
{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
{{ '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""

# The system text and the tools stand before the last question; turns must change; calls carry their ids.
MISTRAL = """\
{%- set ns = namespace(last=0, system='') -%}
{%- if messages[0].role == 'system' -%}
{%- set ns.system = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- bos_token -}}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{%- if loop.index0 == ns.last and tools -%}
{{ '[AVAILABLE_TOOLS] [' }}
{%- for tool in tools -%}{{ (tool | tojson) + (']' if loop.last else ', ') }}{%- endfor -%}
{{ '[/AVAILABLE_TOOLS]' }}
{%- endif -%}
{{ '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls -%}
{{ '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls -%}
{%- if call.id is not defined or call.id | length != 9 -%}
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif -%}
{{ '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}
{%- endfor -%}
{{ eos_token }}
{%- elif m.role == 'assistant' -%}
{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' -%}
{{ '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif -%}
{%- endfor -%}
"""

# Neither system nor tools; the roles must change; no token of its own opens the answer.
MISTRAL_OLD = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}
{%- endfor -%}
"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{ '<start_of_turn>' + role + '\n' + (m.content | trim) + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

# An end of text after the last turn, beside the end of the turn.
PHI = """\
{%- for m in messages -%}
{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}
"""

# Thinking is cut out of all turns but the last; arguments are joined to text; an answer to a result has no
# header.
DEEPSEEK = """\
{{- bos_token -}}
{%- set ns = namespace(result=false) -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ m.content }}
{%- elif m.role == 'user' -%}{%- set ns.result = false -%}{{ '<|User|>' + m.content }}
{%- elif m.role == 'tool' -%}{%- set ns.result = true -%}{{ '<|output|>' + m.content + '<|/output|>' }}
{%- else -%}
{%- if not ns.result -%}{{ '<|Assistant|>' }}{%- endif -%}
{%- set ns.result = false -%}
{{ m.content if loop.last else m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls or [] -%}
{{ '<|call|>' + call.function.name + '\n' + call.function.arguments + '<|/call|>' }}
{%- endfor -%}
{{ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.result -%}{{ '<|Assistant|>' }}{%- endif -%}
"""

FAMILIES = {
    "chatml": Family(CHATML, ("<|im_start|>", "<|im_end|>")),
    "marked": Family(MARKED, ("<|im_start|>", "<|im_end|>")),
    "llama3": Family(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "qwen3": Family(QWEN3, ("<|im_start|>", "<|im_end|>")),
    "mistral": Family(
        MISTRAL,
        (
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "mistral-old": Family(MISTRAL_OLD, ("[INST]", "[/INST]")),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "phi": Family(PHI, ("<|end|>",)),
    "deepseek": Family(
        DEEPSEEK, ("<|User|>", "<|Assistant|>", "<|output|>", "<|/output|>", "<|call|>", "<|/call|>")
    ),
}


def tokenizer_of(family: str, tokenizer: Any) -> Any:
    """A copy of `tokenizer` with the template and the special tokens of the family."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = FAMILIES[family].template
    other.add_tokens(list(FAMILIES[family].specials), special_tokens=True)
    return other
