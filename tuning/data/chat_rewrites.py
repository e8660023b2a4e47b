"""Rewritten conversations and templates, for templates that leave parts of a conversation out."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from tuning.data.formats import Conversation
from tuning.data.template_layout import Message


def system_folded(conversation: Conversation) -> Conversation | None:
    """The system message as the beginning of the first user turn; None without both."""
    roles = [message["role"] for message in conversation.messages[:2]]
    if roles != ["system", "user"]:
        return None
    system, user, *rest = conversation.messages
    joined = user | {"content": f"{system['content']}\n\n{user['content']}"}
    trained = tuple(index - 1 for index in conversation.trained)
    return Conversation([joined, *rest], trained, conversation.tools)


def reasoning_split(conversation: Conversation) -> Conversation | None:
    """`<think>` parts of answers as reasoning_content, a key that templates know; None without."""
    changed = False
    messages: list[Message] = []
    for message in conversation.messages:
        thought, closing, answer = message["content"].partition("</think>")
        if message["role"] == "assistant" and closing and "reasoning_content" not in message:
            thought = thought.split("<think>")[-1].strip("\n")
            message = message | {"content": answer.lstrip("\n"), "reasoning_content": thought}
            changed = True
        messages.append(message)
    return Conversation(messages, conversation.trained, conversation.tools) if changed else None


@functools.cache
def training_variant(template: str) -> str | None:
    """trl's training variant of a chat template, if trl ships this very template."""
    package = importlib.util.find_spec("trl")
    for place in package.submodule_search_locations or () if package else ():
        for path in sorted(Path(place, "chat_templates").glob("*_training.jinja")):
            original = path.with_name(path.name.replace("_training", ""))
            if original.is_file() and original.read_text(encoding="utf-8") == template:
                return path.read_text(encoding="utf-8")
    return None
