"""Conversations -> text and its trained character spans, for any chat template.

Templates with `{% generation %}` markers mark what is trained. For all others the layout is learned
(template_layout.py). A conversation that does not match its layout, as with templates that split or
drop reasoning, is tried by itself, then with trl's training variant of the template; if its content
is still missing, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data import generation_blocks, template_layout, turn_ends
from tuning.data.chat_rewrites import (
    reasoning_split,
    rewrites_history,
    system_folded,
    training_text,
    training_variant,
    with_clock,
)
from tuning.data.formats import Conversation, Fault, quoted, texts_in
from tuning.data.template_layout import (
    Markers,
    Message,
    NotAligned,
    RenderError,
    Spans,
    TemplateLayout,
)

_REASONING = re.compile("reasoning|thinking")
_OPENED = (
    "prompts open an answer with {}, which these answers lack: they are trained without it, and "
    "asked for with it"
)
_NO_END = (
    "the template ends an answer in no marker, and the base model has no end-of-sequence token: "
    "answers do not learn where to end"
)
_EARLIER_OPEN = (
    "the template ends earlier answers in no marker: only the last answer of a conversation "
    "learns where to end"
)
_VARIANT_USED = "the template leaves words out: trl's training variant of it is used"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and its trained character spans."""

    text: str
    spans: Spans


class ChatTemplate:
    """A tokenizer's chat template (or the user's), with the layouts learned so far."""

    def __init__(self, tokenizer: Any, text: str, *, markers: bool = True) -> None:
        self._tokenizer = tokenizer
        self._source = text
        self._text = with_clock(text)
        self._marked = markers and _GENERATION.search(text) is not None
        self._markers = Markers.of(tokenizer)  # their ends are learned when they are needed
        self._special = template_layout.any_of(self._markers.special)
        self._eos: str = tokenizer.eos_token or ""
        self._layouts: dict[Any, TemplateLayout | Fault] = {}
        self._folds: bool | None = None  # whether the system message opens the first user turn
        self._variant: ChatTemplate | None = None
        self.notes: dict[str, int] = {}
        if markers and not self._marked and rewrites_history(text):
            self._prefer_variant()

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | Fault]:
        """The text and trained spans of each conversation, or its fault."""
        prepared: list[tuple[Conversation, TemplateLayout] | Rendered | Fault] = []
        for conversation in map(self._folded, conversations):
            prepared.append(self._special_token(conversation) or self._prepare(conversation))
        plain = [item for item in prepared if isinstance(item, tuple)]
        texts = iter(self._render_batch([conversation for conversation, _ in plain]))
        return [
            self._align(item, next(texts)) if isinstance(item, tuple) else item for item in prepared
        ]

    def _prepare(
        self, conversation: Conversation
    ) -> tuple[Conversation, TemplateLayout] | Rendered | Fault:
        """A plain conversation with its layout; one with tools or reasoning is rendered at once."""
        messages = conversation.messages
        if conversation.tools or any(len(message) > 2 for message in messages):
            return self._render_alone(conversation)
        structure = (*(m["role"] if m["content"] else m["role"] + "0" for m in messages),)
        key = (structure, conversation.trained)
        if key not in self._layouts:
            try:
                self._layouts[key] = self._learn(conversation)
            except (RenderError, NotAligned) as error:
                self._layouts[key] = _fault(error)
        layout = self._layouts[key]
        return layout if isinstance(layout, Fault) else (conversation, layout)

    def _folded(self, conversation: Conversation) -> Conversation:
        """The conversation as prompts show it, too: with its system message where it is shown."""
        if self._folds is None:
            self._folds = turn_ends.folds_system(self._render_one, self._markers)
        if self._folds and (folded := system_folded(conversation)):
            self._note("the template leaves the system message out: it opens the first user turn")
            return folded
        return conversation

    def _learn(self, conversation: Conversation) -> TemplateLayout:
        messages, trained = conversation.messages, conversation.trained
        markers = self._known_markers()
        if self._marked:
            blanks = template_layout.with_placeholders(messages)
            text, blocks = self._generation_spans(blanks, conversation.tools)
            places = template_layout.find_placeholders(text, blanks)
            spans, ended = generation_blocks.answers(
                text, blocks, messages, trained, places=places, markers=markers
            )
            if None in ended:
                self.notes["the template's generation markers leave answers out"] = 0
            return template_layout.cut(text, places, spans, [has is not False for has in ended])

        def render(turns: list[Message], add_generation_prompt: bool) -> str:
            return self._render_one(turns, conversation.tools, add_generation_prompt)

        return template_layout.learn(render, messages, trained, markers)

    def _known_markers(self) -> Markers:
        """The tokenizer's markers, with those that end a turn in this template."""
        if self._markers.ends is None:
            known = turn_ends.learned(self._render_one, self._markers)
            self._markers = replace(known, ends=(known.ends or frozenset()) | {self._eos} - {""})
        return self._markers

    def _align(
        self, item: tuple[Conversation, TemplateLayout], text: str | RenderError
    ) -> Rendered | Fault:
        conversation, layout = item
        if isinstance(text, RenderError):
            return _fault(text)
        try:
            spans = layout.align(text, conversation.messages)
        except NotAligned:
            return self._render_alone(conversation)
        return self._with_end(text, spans, conversation, layout)

    def _with_end(
        self, text: str, spans: Spans, conversation: Conversation, layout: TemplateLayout
    ) -> Rendered:
        """Adds an end-of-sequence token if no marker ends the last answer."""
        if layout.opening:
            self._note(_OPENED.format(quoted(layout.opening)))
        if not layout.all_ended:
            self._note(_EARLIER_OPEN)
        if layout.ended or conversation.trained[-1:] != (len(conversation.messages) - 1,):
            return Rendered(text, spans)
        if not self._eos:
            self._note(_NO_END)
            return Rendered(text, spans)
        self._note("the template ends an answer in no marker: the end-of-sequence token is added")
        return Rendered(text + self._eos, [*spans, (len(text), len(text) + len(self._eos))])

    def _render_alone(self, conversation: Conversation) -> Rendered | Fault:
        """Render a conversation that has tools or reasoning, or does not match its layout.

        Tries the template, its training variant, and rewritten conversations.
        """
        variant = self._training_variant()
        thinks = any("</think>" in message["content"] for message in conversation.messages)
        if variant and thinks and not _REASONING.search(self._source):
            # the template has no key for reasoning: only the variant shows complete answers
            rendered = variant.render([conversation])[0]
            if isinstance(rendered, Rendered):
                self._note(_VARIANT_USED)
                return rendered
        attempts = [(self, conversation)]
        if split := reasoning_split(conversation):
            attempts.append((self, split))
        if variant:
            attempts += [(variant, rewritten) for _, rewritten in attempts]
        first_error: RenderError | NotAligned | None = None
        for template, rewritten in attempts:
            try:
                rendered = template._learn_and_align(rewritten)
            except (RenderError, NotAligned) as error:
                first_error = first_error or error
                continue
            if template is variant:
                self._note(_VARIANT_USED)
            return rendered
        assert first_error is not None
        return _fault(first_error)

    def _learn_and_align(self, conversation: Conversation) -> Rendered:
        """Render with a layout of its own. Raises RenderError or NotAligned."""
        text = self._render_one(conversation.messages, conversation.tools)
        layout = self._learn(conversation)
        spans = layout.align(text, conversation.messages)
        template_layout.check_complete(text, spans, conversation)
        return self._with_end(text, spans, conversation, layout)

    def _prefer_variant(self) -> None:
        """Train earlier answers as they were generated, not as the template rewrites them."""
        note = "the template shows earlier answers otherwise than the one that is asked for"
        if (text := training_text(self._source)) != self._source:
            self._text = with_clock(text)
            note += "; trl's training variant of it is used"
        self.notes[note] = 0

    def _training_variant(self) -> ChatTemplate | None:
        if self._variant is None and (text := training_variant(self._source)):
            self._variant = ChatTemplate(self._tokenizer, text, markers=False)
        return self._variant

    def _special_token(self, conversation: Conversation) -> Fault | None:
        """The fault that a text holds a special token, which would end or begin a turn."""
        for index, message in enumerate(conversation.messages):
            if len(message) == 2 and not self._special.search(message["content"]):
                continue  # nearly all
            for text in texts_in(message):
                if match := self._special.search(text):
                    where = f"message {index} (role {message['role']})"
                    return _special_token_fault(where, match[0])
        for text in texts_in(conversation.tools or []):
            if match := self._special.search(text):
                return _special_token_fault("tools", match[0])
        return None

    def _render_batch(self, conversations: Sequence[Conversation]) -> list[str | RenderError]:
        """The text of each conversation, or the error of its rendering."""
        try:
            return list(self._apply([c.messages for c in conversations])) if conversations else []
        except RenderError as error:
            if len(conversations) == 1:
                return [error]
            return [text for each in conversations for text in self._render_batch([each])]

    def _render_one(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool = False,
    ) -> str:
        return self._apply([messages], tools, add_generation_prompt)[0]

    def _apply(
        self,
        batch: list[list[Message]],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[str]:
        try:
            texts: list[str] = self._tokenizer.apply_chat_template(
                batch,
                tools=tools,
                chat_template=self._text,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # an untrusted program may raise anything
            raise RenderError(str(error)) from error
        return texts

    def _generation_spans(
        self, messages: list[Message], tools: list[Any] | None
    ) -> tuple[str, Spans]:
        """The text, and the spans inside the template's own `{% generation %}` markers."""
        # here, since a run's parent imports this module and renders nothing
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), (spans,) = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._text,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # as above
            raise RenderError(str(error)) from error
        return text, list(spans)

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1


def _special_token_fault(where: str, token: str) -> Fault:
    what = f"{where} holds {quoted(token)}, which is a special token of the base model"
    return Fault("DATA-233", what, "remove it from the text, or remove the row")


def _fault(error: RenderError | NotAligned) -> Fault:
    if isinstance(error, RenderError):
        what = f"the chat template refuses the conversation: {quoted(str(error))}"
        return Fault("DATA-232", what, "write the turns as the template requires")
    return Fault(
        "DATA-231",
        f"the chat template does not show {error} as it is written",
        "set ModelConfig.chat_template to one that shows all of it, or change the row",
    )
