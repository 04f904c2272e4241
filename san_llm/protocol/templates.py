"""Chat templates of our own making, by name, for bases that come without one."""

from __future__ import annotations

from typing import get_args

from san_llm.protocol.prompts import PromptStyle, training_prompt

_ASK = "{% if add_generation_prompt %}"
_PLACE = "@@CONTENT@@"


def _framed(style: PromptStyle) -> str:
    """Return a style's text around each question as a template, a system prompt before it."""
    frame = training_prompt(style, _PLACE).replace(_PLACE, "{{ message.content }}")
    return (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
        "{% elif message.role == 'system' %}{{ message.content }}{{ '\\n\\n' }}"
        f"{{% else %}}{frame}{{% endif %}}{{% endfor %}}"
    )


TEMPLATES = {
    "chatml": "{% for message in messages %}<|im_start|>{{ message.role }}{{ '\\n' }}"
    "{{ message.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
    + _ASK
    + "<|im_start|>assistant{{ '\\n' }}{% endif %}",
    "llama-3": "{{ bos_token or '' }}{% for message in messages %}<|start_header_id|>"
    "{{ message.role }}<|end_header_id|>{{ '\\n\\n' }}{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}"
    + _ASK
    + "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}",
    **{style: _framed(style) for style in get_args(PromptStyle) if style != "chat"},
}
