"""Conversations -> text and the spans of it that are trained, for any chat template.

Templates with `{% generation %}` markers say themselves what is trained. For all others a skeleton
is learned (skeleton.py). A conversation that does not lie on its skeleton, as with templates that
take reasoning apart or leave it out, is tried by itself, then with the training variant that trl
ships for well-known templates; if its own words are still not there, it is refused.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from tuning.data import skeleton
from tuning.data.formats import Conversation, Fault, quoted, texts_in
from tuning.data.skeleton import Message, Skeleton, Spans, Unplaced, squeeze

_PLAIN = {"role", "content"}
_REASONS = re.compile("reasoning|thinking")
_BY_TWIN = "the template leaves words out: trl's training variant of it is used"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates print today's date; a recipe has no clock, so the date is the one that llama's
# templates themselves print where no clock is at hand.
_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}"
    "{%- endmacro -%}"
)


class Refused(Exception):
    """The template itself raised an error."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the character spans of it that are trained."""

    text: str
    spans: Spans


class Template:
    """A tokenizer's chat template (or the user's), with what was learned about it."""

    def __init__(self, tokenizer: Any, text: str, *, markers: bool = True) -> None:
        self._tokenizer = tokenizer
        self._source = text
        self._text = _CLOCK + text if "strftime_now" in text else text
        self._marked = markers and _GENERATION.search(text) is not None
        added = tokenizer.added_tokens_decoder.values()
        self._marker = _any_of(str(token) for token in added)
        self._special = _any_of(
            {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        )
        self._eos: str = tokenizer.eos_token or ""
        self._skeletons: dict[Any, Skeleton | Fault] = {}
        self._folding: set[Any] = set()
        self._twin: Template | None = None
        self.notes: dict[str, int] = {}
        if markers and not self._marked and self._rewrites():
            self._prefer_twin()

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | Fault]:
        """Text and trained spans of each conversation, or why there are none."""
        known: list[tuple[Conversation, Skeleton] | Rendered | Fault] = []
        for conversation in conversations:
            known.append(self._typed(conversation) or self._known(conversation))
        plain = [item for item in known if isinstance(item, tuple)]
        texts = iter(self._texts([conversation for conversation, _ in plain]))
        return [
            self._placed(item, next(texts)) if isinstance(item, tuple) else item for item in known
        ]

    def _known(
        self, conversation: Conversation
    ) -> tuple[Conversation, Skeleton] | Rendered | Fault:
        """The skeleton of a plain conversation; one with tools or reasoning is done by itself."""
        messages = conversation.messages
        if conversation.tools or any(len(message) > 2 for message in messages):
            return self._alone(conversation)
        key = (*(m["role"] if m["content"] else m["role"] + "0" for m in messages),)
        key = (key, conversation.trained)
        if key not in self._skeletons:
            self._skeletons[key] = self._learned(conversation, key)
        found = self._skeletons[key]
        if isinstance(found, Fault):
            return found
        if key in self._folding:
            self._note("the template leaves the system message out: it opens the first user turn")
            conversation = _folded(conversation)
        return conversation, found

    def _learned(self, conversation: Conversation, key: Any) -> Skeleton | Fault:
        try:
            return self._learn(conversation)
        except (Refused, Unplaced) as error:
            if _foldable(conversation):
                try:
                    found = self._learn(_folded(conversation))
                except (Refused, Unplaced):
                    return _fault(error)
                self._folding.add(key)
                return found
            return _fault(error)

    def _learn(self, conversation: Conversation) -> Skeleton:
        messages, trained = conversation.messages, conversation.trained
        if self._marked:
            blanks = skeleton.blanked(messages)
            text, spans = self._generation(blanks, conversation.tools)
            ends = skeleton.find_placeholders(text, blanks)
            left_out = [
                ends[index]
                for index, message in enumerate(messages)
                if message["role"] == "assistant" and index not in trained and index in ends
            ]
            spans = [(a, b) for a, b in spans if not any(a < end <= b for end in left_out)]
            return skeleton.cut(text, ends, spans, self._ends_turn(text, spans))

        def show(turns: list[Message], ask: bool) -> str:
            return self._text_of(turns, conversation.tools, ask=ask)

        return skeleton.learn(show, messages, trained, self._marker)

    def _placed(self, item: tuple[Conversation, Skeleton], text: str | Refused) -> Rendered | Fault:
        conversation, found = item
        if isinstance(text, Refused):
            return _fault(text)
        try:
            spans = found.place(text, conversation.messages)
        except Unplaced:
            return self._alone(conversation)
        return self._closed(text, spans, conversation, found.ended)

    def _closed(self, text: str, spans: Spans, conversation: Conversation, ended: bool) -> Rendered:
        """With an end-of-sequence token where the template ends the last answer in nothing."""
        if ended or not self._eos or conversation.trained[-1:] != (len(conversation.messages) - 1,):
            return Rendered(text, spans)
        self._note("the template ends an answer in no marker: the end-of-sequence token is added")
        return Rendered(text + self._eos, [*spans, (len(text), len(text) + len(self._eos))])

    def _alone(self, conversation: Conversation) -> Rendered | Fault:
        """A conversation with tools, reasoning or words that the template takes apart."""
        twin = self._twin_template()
        thinks = any("</think>" in message["content"] for message in conversation.messages)
        if twin and thinks and not _REASONS.search(self._source):
            # it knows no field for reasoning, so only the variant can show what an answer holds
            rendered = twin.render([conversation])[0]
            if isinstance(rendered, Rendered):
                self._note(_BY_TWIN)
                return rendered
        failed: Refused | Unplaced | None = None
        attempts = [(self, conversation)]
        if (split := _reasoning_apart(conversation)) is not conversation:
            attempts.append((self, split))
        if twin:
            attempts += [(twin, tried) for _, tried in attempts]
        if _foldable(conversation):
            attempts.append((self, _folded(conversation)))
        for template, tried in attempts:
            try:
                found = template._one(tried)
            except (Refused, Unplaced) as error:
                failed = failed or error
                continue
            if template is twin:
                self._note(_BY_TWIN)
            return found
        assert failed is not None
        return _fault(failed)

    def _one(self, conversation: Conversation) -> Rendered:
        """One conversation by itself. Raises Refused or Unplaced."""
        text = self._text_of(conversation.messages, conversation.tools)
        found = self._learn(conversation)
        spans = found.place(text, conversation.messages)
        _check_words(text, spans, conversation)
        return self._closed(text, spans, conversation, found.ended)

    def _rewrites(self) -> bool:
        try:
            return skeleton.rewrites(lambda turns, ask: self._text_of(turns, None, ask=ask))
        except (Refused, Unplaced):
            return False

    def _prefer_twin(self) -> None:
        """Train earlier answers as they were given, not as they look in hindsight."""
        note = "the template shows earlier answers otherwise than the one that is asked for"
        if text := _training_variant(self._source):
            self._text = text
            note += "; trl's training variant of it is used"
        self.notes[note] = 0

    def _twin_template(self) -> Template | None:
        if self._twin is None and (text := _training_variant(self._source)):
            self._twin = Template(self._tokenizer, text, markers=False)
        return self._twin

    def _typed(self, conversation: Conversation) -> Fault | None:
        """A special token among a conversation's words would end or open a turn."""
        for index, message in enumerate(conversation.messages):
            if len(message) == 2 and not self._special.search(message["content"]):
                continue  # nearly all
            for text in texts_in(message):
                if found := self._special.search(text):
                    return _special_fault(f"message {index} (role {message['role']})", found[0])
        for text in texts_in(conversation.tools or []):
            if found := self._special.search(text):
                return _special_fault("tools", found[0])
        return None

    def _texts(self, conversations: Sequence[Conversation]) -> list[str | Refused]:
        if not conversations:
            return []
        try:
            return list(self._apply([c.messages for c in conversations]))
        except Refused:
            return [self._try(conversation) for conversation in conversations]

    def _try(self, conversation: Conversation) -> str | Refused:
        try:
            return self._text_of(conversation.messages, conversation.tools)
        except Refused as refused:
            return refused

    def _text_of(
        self, messages: list[Message], tools: list[Any] | None, *, ask: bool = False
    ) -> str:
        return self._apply([messages], tools=tools, ask=ask)[0]

    def _apply(
        self, batch: list[list[Message]], *, tools: list[Any] | None = None, ask: bool = False
    ) -> list[str]:
        try:
            texts: list[str] = self._tokenizer.apply_chat_template(
                batch,
                tools=tools,
                chat_template=self._text,
                add_generation_prompt=ask,
                tokenize=False,
            )
        except Exception as error:  # a template is a stranger's program: it may raise anything
            raise Refused(str(error)) from error
        return texts

    def _generation(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, Spans]:
        """The text and the spans that the template's own markers name."""
        try:
            texts, found = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._text,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # as above
            raise Refused(str(error)) from error
        return texts[0], [self._trimmed(texts[0], a, b) for a, b in found[0]]

    def _trimmed(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked span, to the end of the marker that ends the turn, without white space after."""
        if self._eos and text.startswith(self._eos, end):
            return start, end + len(self._eos)
        inside = [match.end() for match in self._marker.finditer(text, start, end)]
        if inside and not text[inside[-1] : end].strip():
            end = inside[-1]
        return start, end

    def _ends_turn(self, text: str, spans: Spans) -> bool:
        end = spans[-1][1] if spans else 0
        return any(match.end() == end for match in self._marker.finditer(text))

    def _note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1


def _any_of(words: Any) -> re.Pattern[str]:
    ordered = sorted({word for word in words if word}, key=lambda word: (-len(word), word))
    return re.compile("|".join(re.escape(word) for word in ordered) or r"(?!)")


def _special_fault(where: str, token: str) -> Fault:
    what = f"{where} holds {quoted(token)}, which is a special token of the base model"
    return Fault("DATA-233", what, "remove it from the text, or remove the row")


def _fault(error: Refused | Unplaced) -> Fault:
    if isinstance(error, Refused):
        what = f"the chat template refuses the conversation: {quoted(str(error))}"
        return Fault("DATA-232", what, "write the turns as the template wants them")
    return Fault(
        "DATA-231",
        f"the chat template does not show {error} as it is written",
        "set ModelConfig.chat_template to one that shows all of it, or change the row",
    )


def _foldable(conversation: Conversation) -> bool:
    roles = [message["role"] for message in conversation.messages[:2]]
    return roles == ["system", "user"]


def _folded(conversation: Conversation) -> Conversation:
    """The system message as the beginning of the first user turn."""
    system, user, *rest = conversation.messages
    joined = user | {"content": f"{system['content']}\n\n{user['content']}"}
    trained = tuple(index - 1 for index in conversation.trained)
    return Conversation([joined, *rest], trained, conversation.tools)


def _reasoning_apart(conversation: Conversation) -> Conversation:
    """`<think>` parts of the answers as reasoning_content, the field that templates print."""
    changed = False
    messages: list[Message] = []
    for message in conversation.messages:
        thought, closing, said = message["content"].partition("</think>")
        if message["role"] == "assistant" and closing and "reasoning_content" not in message:
            thought = thought.split("<think>")[-1].strip("\n")
            message = message | {"content": said.lstrip("\n"), "reasoning_content": thought}
            changed = True
        messages.append(message)
    if not changed:
        return conversation
    return Conversation(messages, conversation.trained, conversation.tools)


def _check_words(text: str, spans: Spans, conversation: Conversation) -> None:
    """All that a trained turn says must stand in the trained part. Raises Unplaced."""
    said = squeeze("".join(text[start:end] for start, end in spans))
    at = 0
    for index in conversation.trained:
        message = conversation.messages[index]
        thought = next(
            (message[k] for k in ("reasoning_content", "thinking", "reasoning") if message.get(k)),
            "",
        )
        calls = [call.get("function", call).get("name", "") for call in _calls(message)]
        for words in (thought, message["content"]):
            if isinstance(words, str):
                at = said.find(squeeze(words), at)
                if at < 0:
                    raise Unplaced(f"message {index} (role assistant)")
                at += len(squeeze(words))
        if any(squeeze(str(name)) not in said for name in calls):
            raise Unplaced(f"the tool call of message {index}")
    shown = squeeze(text)
    for tool in conversation.tools or ():
        name = tool.get("function", tool).get("name", "")
        if squeeze(str(name)) not in shown:
            raise Unplaced(f"the tool {quoted(name)}")


def _calls(message: Message) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    return [call for call in calls if isinstance(call, dict)]


@functools.cache
def _training_variant(text: str) -> str | None:
    """trl's training variant of the template `text`, if trl knows it to the letter."""
    package = importlib.util.find_spec("trl")
    for place in package.submodule_search_locations or () if package else ():
        for path in sorted(Path(place, "chat_templates").glob("*_training.jinja")):
            plain = path.with_name(path.name.replace("_training", ""))
            if plain.is_file() and plain.read_text(encoding="utf-8") == text:
                return path.read_text(encoding="utf-8")
    return None
