"""Examples -> token ids and their trained ranges.

A token is trained if it holds characters of a trained span, because tokenizers join the beginning
of an answer to the end of the header ("Answer: " and "four" are ":" and " four"). Markers that
swallow the white space after them, like Phi-3's, are not trained for that. Offsets are raw: the
post-processor, which trims white space off them and adds special tokens, is removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from tuning.data.chat import ChatTemplate, Rendered
from tuning.data.formats import Conversation, Fault, Pair, Plain, Text, Tokens, quoted
from tuning.data.template_layout import Spans

CHECKED = 1000  # rows whose turns are searched for the marks of a chat format
_RENDERED = re.compile(
    r"\[/INST\]|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|assistant\|>"
    r"|^### (?:Response|Assistant|Instruction):",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Encoded:
    """One row; `trained` holds [start, end) pairs of token indices, flat and in order."""

    ids: list[int]
    trained: list[int]


@dataclass(frozen=True)
class _Text:
    text: str
    spans: Spans
    is_bare: bool  # not from a template: gets the tokenizer's prefix and an end-of-sequence token


class Encoder:
    """Encodes examples with a tokenizer and its chat template."""

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate | None,
        *,
        train_on: Literal["assistant", "all"],
        embedding_rows: int | None = None,
        new_tokens: int = 0,
    ) -> None:
        """`new_tokens`: how many of the tokenizer's last tokens get rows of their own."""
        self._template = template
        self._all = train_on == "all"
        self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._fast.post_processor = None
        self._fast.no_truncation()
        self._fast.no_padding()
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values(), default=-1) + 1
        self._new = self._size - new_tokens  # the first of them
        if embedding_rows is not None and embedding_rows >= self._new:
            embedding_rows = max(embedding_rows, self._size)
        self._rows = embedding_rows
        self._chats = 0  # so far
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        complete = tokenizer("a")["input_ids"]
        starts = (n for n in range(len(complete)) if complete[n : n + len(bare)] == bare)
        self._prefix: list[int] = list(complete[: next(starts, 0)])
        self._suffix: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._added = set(tokenizer.added_tokens_decoder)
        self._special = tuple(filter(None, tokenizer.all_special_tokens))
        self.raw_pairs: bool | None = None  # decided by the first raw pairs

    def encode(self, examples: Sequence[Plain]) -> list[Encoded | Fault]:
        """The ids and trained ranges of each example, or its fault."""
        self.decide_pairs(examples)
        prepared = [self._without_template(example) for example in examples]
        chats = [
            each.as_conversation() if isinstance(each, Pair) else each
            for each, text in zip(examples, prepared, strict=True)
            if text is None and isinstance(each, (Pair, Conversation))
        ]
        if chats:
            assert self._template is not None
            self._note_rendered(chats)
            rendered = iter(self._template.render(chats))
            prepared = [text or self._from_template(next(rendered)) for text in prepared]
        texts = [each.text for each in prepared if isinstance(each, _Text)]
        encodings = iter(self._fast.encode_batch(texts, add_special_tokens=False))
        encoded = [
            self._encoded(each, next(encodings)) if isinstance(each, _Text) else each
            for each in prepared
            if each is not None
        ]
        if self._rows is None or self._rows >= self._size:
            return encoded
        return [(isinstance(each, Encoded) and self._beyond(each.ids)) or each for each in encoded]

    def _note_rendered(self, chats: Sequence[Conversation]) -> None:
        """Count, among the first rows, turns that hold another rendering of a chat already."""
        notes, checked = self.notes, chats[: max(0, CHECKED - self._chats)]
        self._chats += len(chats)
        for chat in checked:
            for message in chat.messages:
                if found := _RENDERED.search(message["content"] or ""):
                    text = f"turns of the first rows hold marks of another chat format: {found[0]}"
                    notes[text] = notes.get(text, 0) + 1
                    break

    @property
    def notes(self) -> dict[str, int]:
        """Unexpected effects of the chat template, each with its number of rows."""
        return self._template.notes if self._template else {}

    @property
    def pairs_are_chats(self) -> bool:
        """Whether pairs are rendered as a user turn and an assistant turn."""
        return self._template is not None and not self.raw_pairs

    def decide_pairs(self, examples: Sequence[Plain]) -> None:
        """Decide by the first raw pairs whether pairs are rendered already.

        They are if most prompts begin with special tokens; then no template is applied, and a
        prompt without is a fault. Otherwise one with is, since a turn may hold no special token.
        """
        raw = [example for example in examples if isinstance(example, Pair) and example.raw]
        if raw and self.raw_pairs is None:
            rendered = sum(map(self._is_rendered, raw))
            self.raw_pairs = rendered > len(raw) / 2

    def _is_rendered(self, pair: Pair) -> bool:
        return pair.prompt.lstrip().startswith(self._special)

    def _without_template(self, example: Plain) -> _Text | Encoded | Fault | None:
        """An example that needs no chat template; None if it needs one."""
        if isinstance(example, Tokens):
            return self._checked(example)
        if isinstance(example, Text):
            return _Text(example.text, [(0, len(example.text))], is_bare=True)
        if isinstance(example, Pair) and not self.pairs_are_chats:
            if self._template and example.raw and example.system.strip():
                return Fault(
                    "DATA-226",
                    "a column holds a system message, and the prompts are rendered already",
                    "render it into the prompt, and remove the column",
                )
            if self._template and example.raw and not self._is_rendered(example):
                return Fault(
                    "DATA-214",
                    "the prompt begins with no special token, but the first prompts are rendered "
                    "as chats already",
                    "render all prompts, or none: then the chat template is applied to each",
                )
            text = example.bare + example.completion
            return _Text(text, [(0 if self._all else len(example.bare), len(text))], is_bare=True)
        if self._template is None:
            return Fault(
                "DATA-244",
                "is a conversation, but the base model has no chat template",
                "set ModelConfig.chat_template, or take the model's instruct variant",
            )
        return None

    def _from_template(self, rendered: Rendered | Fault) -> _Text | Fault:
        if isinstance(rendered, Fault):
            return rendered
        spans = [(0, len(rendered.text))] if self._all else rendered.spans
        return _Text(rendered.text, spans, is_bare=False)

    def _checked(self, tokens: Tokens) -> Encoded | Fault:
        if beyond := self._beyond(tokens.input_ids):
            return beyond
        if (highest := max(tokens.input_ids)) >= self._size:
            what = f"input_ids holds {highest}, but the tokenizer has {self._size} tokens"
            change = "tokenise with the base model's own tokenizer, or give the text"
            return Fault("DATA-247", what, change)
        trained = [0, len(tokens.input_ids)] if self._all else list(tokens.trained)
        return Encoded(tokens.input_ids, trained)

    def _beyond(self, ids: list[int]) -> Fault | None:
        """The fault that a token has no row in the embedding."""
        token = max((id for id in ids if not self._new <= id < self._size), default=-1)
        if self._rows is None or token < self._rows:
            return None
        known = token < self._size
        spelled = self._fast.id_to_token(token) if known else None
        return beyond_embedding(token, self._rows, spelled)

    def _encoded(self, text: _Text, encoding: Any) -> Encoded:
        ids: list[int] = encoding.ids
        trained: list[int] = []
        for start, end in text.spans:
            first, last = self._token_range(encoding, ids, start, end)
            if first < last:
                if trained and trained[-1] >= first:
                    trained[-1] = last
                else:
                    trained += (first, last)
        if not text.is_bare:
            return Encoded(ids, trained)
        prefix = [] if ids[: len(self._prefix)] == self._prefix else self._prefix
        suffix = [] if ids[-1:] == self._suffix else self._suffix
        shift = len(prefix)
        trained = [position + shift for position in trained]
        if trained and trained[-1] == shift + len(ids):
            trained[-1] += len(suffix)
        return Encoded(prefix + ids + suffix, trained)

    def _token_range(self, encoding: Any, ids: list[int], start: int, end: int) -> tuple[int, int]:
        """The tokens that hold characters of [start, end)."""
        at, first = start, None
        while at < end and (first := encoding.char_to_token(at)) is None:
            at += 1
        if first is None:
            return 0, 0
        if ids[first] in self._added and encoding.token_to_chars(first)[0] < start:
            first += 1
        at, last = end - 1, None
        while at >= start and (last := encoding.char_to_token(at)) is None:
            at -= 1
        assert last is not None
        while last + 1 < len(ids) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1  # the bytes of one character are several tokens
        return first, last + 1


def beyond_embedding(token: int, rows: int, text: str | None = None) -> Fault:
    """The fault that `token`, spelled `text`, has no row among the `rows` of the embedding."""
    spelled = "" if text is None else f", {quoted(text)}"
    what = f"holds token {token}{spelled}, but the base model's embedding has {rows} rows"
    change = "remove the token from text and chat template, or give the tokenizer of these weights"
    return Fault("DATA-254", what, change)
