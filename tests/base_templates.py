"""Chat templates as bases have them, one for each thing that they do, for the tokenizers of small_tokenizers."""

_TURN = "{{- '<start_of_turn>' + message.role + '\n' + message.content + '</s>\n' }}"
_ASKED = "{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\n' }}{%- endif %}"
_ALTERNATE = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/...') }}{%- endif %}"
)

# A system text of its own where a conversation has none, as Qwen 2.5's; definitions and calls of tools.
DEFAULT_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = 'You are a small model.' %}{%- endif %}"
    "{{- '<start_of_turn>system\n' + system }}"
    "{%- if tools %}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{%- endif %}"
    "{{- '</s>\n' }}"
    "{%- for message in messages %}{{- '<start_of_turn>' + message.role + '\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}{{- '<call>' + (call.function | tojson) + '</call>' }}{%- endfor %}"
    "{{- '</s>\n' }}{%- endfor %}" + _ASKED
)
# Texts are trimmed, and today's date is written, as Llama 3.2's.
TRIMMED = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday is ' + strftime_now('%d %B %Y') + '\n' }}"
    "{{- system + '</s>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' "
    "+ message.content | trim + '</s>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# Neither a system text nor any order but user, assistant, ..., as Gemma's.
ALTERNATING = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}"
    "{%- endif %}{%- for message in messages %}" + _ALTERNATE + _TURN + "{%- endfor %}" + _ASKED
)
# The system text in the first turn of the user, as Gemma 3's.
SYSTEM_IN_TURN = (
    "{{- bos_token }}{%- set lead = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set lead = messages[0].content + '\n\n' %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for message in messages %}" + _ALTERNATE + "{{- '<start_of_turn>' + message.role + '\n' }}"
    "{%- if loop.first %}{{- lead }}{%- endif %}{{- message.content + '</s>\n' }}{%- endfor %}" + _ASKED
)
# Reasoning before the last answer alone, empty where there is none, as Qwen 3's.
REASONING = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<start_of_turn>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
    "{{- message.content.split('</think>')[-1].lstrip('\n') + '</s>\n' }}"
    "{%- else %}" + _TURN + "{%- endif %}{%- endfor %}" + _ASKED
)
# The system text in the user's last turn, and not at all once that is answered, as Mistral's.
LAST_SYSTEM = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<start_of_turn>' }}"
    "{%- if loop.last and system is defined %}{{- system + '\n\n' }}{%- endif %}"
    "{{- message.content + '<|end_header_id|>' }}{%- else %}{{- message.content + '</s>' }}{%- endif %}{%- endfor %}"
)
# No special token but at the ends, as Llama 2's.
WORDS = (
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- bos_token + '[INST] ' + message.content "
    "+ ' [/INST]' }}{%- elif message.role == 'assistant' %}{{- ' ' + message.content + ' ' + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
# transformers' tag, which leaves out what the template writes before an answer.
MARKED = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<start_of_turn>assistant\n(said)\n' }}"
    "{% generation %}{{- message.content + '</s>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}" + _TURN + "{%- endif %}{%- endfor %}" + _ASKED
)
# The prompt is always written, as the first one of Llama 3.
ALWAYS_ASKING = "{%- for message in messages %}" + _TURN + "{%- endfor %}{{- '<start_of_turn>assistant\n' }}"

BASE_TEMPLATES = {
    "default_system": DEFAULT_SYSTEM,
    "trimmed": TRIMMED,
    "alternating": ALTERNATING,
    "system_in_turn": SYSTEM_IN_TURN,
    "reasoning": REASONING,
    "last_system": LAST_SYSTEM,
    "words": WORDS,
    "marked": MARKED,
    "always_asking": ALWAYS_ASKING,
}
