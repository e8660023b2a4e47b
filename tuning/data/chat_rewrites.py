"""Rewritten conversations and templates, for templates that leave parts of a conversation out."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from tuning.data import template_layout
from tuning.data.formats import Conversation
from tuning.data.template_layout import Message, NotAligned, RenderError

# A recipe has no clock, so the date is the one that llama's templates print without a clock.
_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}"
    "{%- endmacro -%}"
)


def system_folded(conversation: Conversation) -> Conversation | None:
    """The system message as the beginning of the first user turn; None without both."""
    messages = folded(conversation.messages)
    if len(messages) == len(conversation.messages):
        return None
    trained = tuple(index - 1 for index in conversation.trained)
    return Conversation(messages, trained, conversation.tools)


def folded(messages: list[Message]) -> list[Message]:
    """`messages` with the system message as the beginning of the first user turn, if both begin."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return messages
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


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


def with_clock(template: str) -> str:
    """`template` without a clock: some print today's date, and training must not depend on it."""
    return _CLOCK + template if "strftime_now" in template else template


@functools.cache
def training_text(template: str) -> str:
    """The template that shows earlier answers as they were generated: trl's training variant of
    `template`, if `template` rewrites them and trl has one."""
    variant = training_variant(template)
    return variant if variant and rewrites_history(template) else template


def as_trained(adapter: Path, template: str) -> str:
    """The text that the adapter in this folder was trained with, of its template."""
    return training_text(template) if (adapter / "tuning.json").is_file() else template


@functools.cache
def rewrites_history(template: str) -> bool:
    """Whether `template` shows an earlier answer otherwise than the last one."""

    from transformers.utils.chat_template_utils import render_jinja_template  # imports torch

    def render(turns: list[Message], ask: bool) -> str:
        try:
            (text,), _ = render_jinja_template(
                [turns],
                chat_template=with_clock(template),
                add_generation_prompt=ask,
                bos_token="",
                eos_token="",
            )
        except Exception as error:  # an untrusted program may raise anything
            raise RenderError(str(error)) from error
        return str(text)

    try:
        return template_layout.rewrites_history(render)
    except (RenderError, NotAligned):
        return False


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
