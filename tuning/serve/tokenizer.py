"""Messages and prompts to tokens, and tokens back to text and bytes.

Chat templates come with the base model or with an adapter, never with a request.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any

from tuning.data import turn_ends
from tuning.data.formats import BadRow
from tuning.data.prompts import Prompts, template_input
from tuning.data.template_layout import RenderError
from tuning.data.tokenizer import own_template
from tuning.serve.detokenizer import vocabulary_decoder
from tuning.serve.rendering import Message, NotRendered, Renderer, TooCostly
from tuning.serve.responses import Echo, offsets


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
        self._template = own_template(self._tokenizer)
        self._special = tokenizer.special_tokens_map
        self._to_bytes = vocabulary_decoder(tokenizer)
        self._bytes: dict[int, bytes] = {}  # of the tokens asked for so far
        named = model.generation_config.eos_token_id
        self._prompts: Prompts | None = None
        self.ends = turn_ends.of(tokenizer, None, named)
        if self._template:
            with contextlib.suppress(TooCostly):  # as each request will be told
                self._prompts = Prompts(tokenizer, self._probe, named=named)
                self.ends = self._prompts.ends

    @property
    def has_template(self) -> bool:
        """Whether it can render conversations."""
        return bool(self._template)

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """The text of `messages`, up to where the answer begins. Raises NotRendered."""
        if not self._template:
            raise NotRendered("this model has no chat template; use /v1/completions")
        if self._prompts is None:
            return self._render(template_input(messages), tools, True)
        try:
            return self._prompts.text(messages, tools)
        except (RenderError, BadRow) as error:
            raise NotRendered(str(error)) from None

    def encode_chat(self, text: str) -> list[int]:
        """The tokens of a rendered conversation."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a plain prompt."""
        return list(self._tokenizer(text, add_special_tokens=True)["input_ids"])

    def echo(self, prompt: str | list[int]) -> Echo:
        """`prompt` as a completion repeats it: as it was sent, or decoded."""
        if isinstance(prompt, str) and self._tokenizer.is_fast:
            encoded = self._tokenizer(prompt, return_offsets_mapping=True)
            ends = itertools.accumulate((end for _, end in encoded["offset_mapping"]), max)
            return Echo(prompt, encoded["input_ids"], [0, *ends][:-1])
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        special = set(self._tokenizer.all_special_ids)  # which `decode` leaves out
        shown = [b"" if id in special else self.token_bytes(id) for id in ids]
        return Echo(self.decode(ids), ids, offsets(shown))

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, without special ones."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, special or not; perhaps half a character."""
        if id not in self._bytes:
            entry = self._tokenizer.convert_ids_to_tokens(id)
            self._bytes[id] = b"" if entry is None else self._to_bytes(str(entry))
        return self._bytes[id]

    def _probe(self, messages: list[dict[str, Any]], tools: list[Any] | None, ask: bool) -> str:
        """As _render, for what renders without a server. Raises RenderError and TooCostly."""
        try:
            return self._render(messages, tools, ask)
        except TooCostly:
            raise
        except NotRendered as error:
            raise RenderError(str(error)) from None

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, ask: bool) -> str:
        return self._renderer(
            self._template or "",
            messages,
            add_generation_prompt=ask,
            special_tokens=self._special,
            tools=tools,
        )
