"""Messages and prompts to tokens, and tokens back to text and bytes.

Chat templates come with the base model or with an adapter, never with a request.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tuning.models import generate
from tuning.serve.detokenizer import vocabulary_decoder
from tuning.serve.rendering import Message, NotRendered, Renderer

_SYSTEM: Message = {"role": "system", "content": "be short"}


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template; the one named "default" if it has several."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


class ChatTokenizer:
    """The tokenizer with one chat template, which `renderer` renders."""

    def __init__(
        self, tokenizer: Any, model: Any, renderer: Renderer, *, template: str | None = None
    ) -> None:
        """`template` is an adapter's; None means the tokenizer's own."""
        self.from_adapter = template is not None
        self._tokenizer, self._renderer = tokenizer, renderer
        if self.from_adapter:
            self._tokenizer = copy.copy(tokenizer)
            self._tokenizer.chat_template = template
        self._template = chat_template(self._tokenizer)
        self._special = tokenizer.special_tokens_map
        self._to_bytes = vocabulary_decoder(tokenizer)
        self.ends = frozenset(generate.stops(model, self._tokenizer, self._turns))

    @property
    def has_template(self) -> bool:
        """Whether it can render conversations."""
        return bool(self._template)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of `messages`, up to where the answer begins. Raises NotRendered."""
        return self._render(messages, add_generation_prompt=True)

    def encode_chat(self, text: str) -> list[int]:
        """The tokens of a rendered conversation."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a plain prompt."""
        return list(self._tokenizer(text, add_special_tokens=True)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, special or not; perhaps half a character."""
        entry = self._tokenizer.convert_ids_to_tokens(id)
        return b"" if entry is None else self._to_bytes(str(entry))

    def _turns(self, turns: list[dict[str, str]]) -> str:
        """The text of `turns`, behind a system message if the template needs one; "" if neither."""
        for system in ([], [_SYSTEM]):
            try:
                return self._render([*system, *turns], add_generation_prompt=False)
            except NotRendered:
                continue
        return ""

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if not self._template:
            raise NotRendered("this model has no chat template; use /v1/completions")
        return self._renderer(
            self._template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special,
        )
