"""Chat messages: a document that is a list of {role, content}, and its text by the tokenizer's chat template."""

from __future__ import annotations

import json
from typing import Any

FIELDS = ("messages", "conversation", "conversations", "chat", "dialog", "dialogue")
"""Names of a hub data set's text_field that hold chat messages. A local source's first row is looked at instead."""
FORM = "a list of {role, content}, both text"


def messages_of(where: str, value: Any) -> list[dict[str, str]] | None:
    """The messages that a list holds, without their further keys; None for an empty one. Raises ValueError naming the
    place.
    """
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{where}: chat messages are {FORM}; this has {str(message)[:80]!r}: convert it, or set "
                "corpus.text_field"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value] or None


def plain(messages: list[dict[str, str]]) -> str:
    """What stands for the messages where a text is asked for, whatever the tokenizer: their JSON."""
    return json.dumps(messages, ensure_ascii=False)


def rendered(where: str, messages: list[dict[str, str]], tokenizer) -> str:
    """The text that the model was trained to read for them, special tokens by name. Raises ValueError naming the
    place.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(no_template(tokenizer.name_or_path, where))
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: the tokenizer's chat template refuses these messages ({error}); remove or convert them"
        ) from error


def no_template(model: str, where: str) -> str:
    return (
        f"{where}: holds chat messages, and the tokenizer of model.name {model} has no chat template to make text of "
        "them; use a model with one, or a corpus.text_field that holds text"
    )
