"""What a tokenizer's chat template makes of a prompt, as text encoders that are language models read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...engines.errors import CheckpointError, UnsupportedModelError
from ..checkpoints.configs import said_by, shown

PROMPTS = ("{}", " a {} b\n")
"""Stand-ins for a prompt: what a template makes of them must be the template with them in place."""

Messages = Callable[[str], Sequence[Mapping[str, Any]]]
"""Returns the messages of a conversation with a prompt."""


class Conversation(NamedTuple):
    """What a chat template makes of messages."""

    template: str
    """What is tokenized, with the prompt in place of `{}`."""
    side: str
    """Where rows of tokens are filled up: left or right."""
    begins: bool
    """Whether it begins with the tokenizer's begin token, where there is one."""


def conversation(folder: Path, class_name: str, messages: Messages, **options: Any) -> Conversation:
    """Return what a tokenizer in a folder makes of a conversation; `options` are those of `apply_chat_template`.

    Raises `CheckpointError` where there is no template that can be used, `UnsupportedModelError` for one that changes
    prompts.
    """
    import transformers

    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
        made = [tokenizer.apply_chat_template(messages(prompt), tokenize=False, **options) for prompt in PROMPTS]
    except Exception as error:  # transformers and jinja raise many kinds
        raise CheckpointError(f"{folder} has no chat template that can be used ({said_by(error)})") from error
    template = str(made[0])
    if template.count("{}") != 1 or made[1] != template.replace("{}", PROMPTS[1]):
        raise UnsupportedModelError(f"{folder}: its chat template changes prompts: {shown(template)}")
    begins = tokenizer.bos_token is None or template.startswith(tokenizer.bos_token)
    return Conversation(template, str(tokenizer.padding_side), begins)
