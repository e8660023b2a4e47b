"""Loads and validates the base model's tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuning.data.chat import ChatTemplate
from tuning.errors import SpecError


def load_tokenizer(base: Path) -> Any:
    """The tokenizer in the folder `base`. Raises SpecError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library raises whatever its parsers raise
        raise SpecError.at(
            "DATA-246",
            "base model",
            f"its tokenizer cannot be loaded ({type(error).__name__}: {str(error)[:200]})",
            "take a base model with tokenizer.json",
        ) from error
    if not tokenizer.is_fast:
        what = f"its tokenizer ({type(tokenizer).__name__}) has no character offsets"
        raise SpecError.at("DATA-246", "base model", what, "take one with tokenizer.json")
    return tokenizer


def load_template(tokenizer: Any, text: str | None) -> ChatTemplate | None:
    """The chat template: the user's `text`, or the tokenizer's own if it has one."""
    source = text or own_template(tokenizer)
    if not source:
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=source)
    except Exception as error:
        if type(error).__name__ == "TemplateSyntaxError":
            where = "ModelConfig.chat_template" if text else "the base model's chat template"
            what = f"is not a valid template: {error}"
            raise SpecError.at("DATA-245", where, what, "repair it") from error
    return ChatTemplate(tokenizer, source)


def own_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; of several, the one named "default", or else the first."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    return own or None
