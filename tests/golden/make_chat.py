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
    document = json.dumps({"cases": cases}, indent=1, ensure_ascii=False)
    Path(__file__).with_name("chat.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
