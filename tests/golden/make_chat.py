"""Remakes chat.json from transformers' template engine: `python -m tests.golden.make_chat`."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

# ChatML as Qwen1.5 uses it, with its default system prompt.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Blocks on lines of their own, loop controls, tojson and special tokens.
BLOCKS = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == "system" %}
        {% continue %}
    {% endif %}
{{ message | tojson }}
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{{ eos_token -}}
"""
# What a template sees of tools that nobody gave.
TOOLS = "{% if tools is not none or documents is not none %}tools{% else %}{{ messages[0].content }}{% endif %}"
# What newer templates use: blocks that mark the answer, `namespace` and `dict`, variables of their own.
MODERN = """{%- set state = namespace(turns=0, roles=dict()) -%}
{%- if tools %}{{ '<tools>\\n' }}{% for tool in tools %}{{ tool | tojson(indent=1) }}{% endfor %}</tools>{% endif -%}
{%- for document in documents or [] %}{{ document.title }}: {{ document.text }}{% endfor -%}
{%- for message in messages -%}
{%- set state.turns = state.turns + 1 -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{%- set inside = 'not seen outside' -%}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}|{{ message.thinking }}</think>{% endif -%}
{{- message.content.split('</think>')[-1].lstrip('\\n') if message.content is string else 'none' -}}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}
{%- endgeneration -%}
{%- elif message.content is string -%}{{ message.content | trim }}{%- else -%}
{%- for part in message.content %}{{ part.text }};{% endfor -%}
{%- endif -%}
{{- inside }}{{ missing }}{{ eos_token }}{% if 'name' in message %}{{ message.name }}{% endif %}
{% endfor -%}
{{ state.turns }}{{ image_token }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}
"""
VARIABLES: dict[str, object] = {"enable_thinking": False, "documents": [{"title": "a", "text": "<b> é"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"é": {}}}}}
MODERN_CONVERSATIONS = [
    [{"role": "user", "content": " two  words \n"}, {"role": "assistant", "content": "x</think>\n\ny", "name": None}],
    [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "yes", "reasoning": "why"},
    ],
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be terse."}, {"role": "user", "content": 'Hi <b>"you" & me</b> 你好'}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  and\n2+2?  "},
    ],
]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def main() -> None:
    """Writes chat.json beside this script."""
    cases = []
    for template in (CHATML, BLOCKS, TOOLS):
        for messages in CONVERSATIONS:
            for add_generation_prompt in (True, False):
                texts, _ = render_jinja_template(
                    [messages],
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    **SPECIAL_TOKENS,
                )
                cases.append(
                    {
                        "template": template,
                        "messages": messages,
                        "add_generation_prompt": add_generation_prompt,
                        "special_tokens": SPECIAL_TOKENS,
                        "text": texts[0],
                    }
                )
    for messages in MODERN_CONVERSATIONS:
        for given in ({}, VARIABLES | {"tools": [TOOL]}):
            tokens = SPECIAL_TOKENS | {"image_token": "<image>"}
            texts, _ = render_jinja_template(
                [[{key: value for key, value in message.items() if value is not None} for message in messages]],
                chat_template=MODERN,
                add_generation_prompt=True,
                **tokens,
                **given,  # type: ignore[arg-type]
            )
            cases.append(
                {
                    "template": MODERN,
                    "messages": messages,
                    "add_generation_prompt": True,
                    "special_tokens": tokens,
                    "tools": given.get("tools"),
                    "variables": {name: value for name, value in given.items() if name != "tools"},
                    "text": texts[0],
                }
            )
    document = json.dumps({"cases": cases}, indent=1, ensure_ascii=False)
    Path(__file__).with_name("chat.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
