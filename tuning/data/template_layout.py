"""The layout of a rendered chat template: literal text between contents, and what is trained.

A layout is learned once per structure (roles and their order) from a conversation whose contents
are placeholders. It holds the literal text between the contents and the parts that the model has to
generate: everything after the generation prompt, up to and including the marker that ends the turn.
A real conversation is rendered once and aligned with the layout: all literals and contents must be
found, in order and to the end, so that a template that rewrites contents is never trained wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data.formats import Conversation, quoted

Message = dict[str, Any]
Spans = list[tuple[int, int]]
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# (messages, add_generation_prompt) -> text; raises RenderError
Render = Callable[[list[Message], bool], str]


class RenderError(Exception):
    """The template itself raised an error."""


class NotAligned(Exception):
    """The rendered text lacks a part of the conversation, which the message names."""


@dataclass(frozen=True)
class Markers:
    """The tokenizer's added tokens, such as <|im_end|>, that a template may put around turns."""

    pattern: re.Pattern[str]  # matches any of them
    special: frozenset[str]
    ends: frozenset[str] | None = None  # those that end a turn; None: not known yet

    @classmethod
    def of(cls, tokenizer: Any) -> Markers:
        """The added tokens of `tokenizer`: special ones need not be among its named ones."""
        added = tokenizer.added_tokens_decoder.values()
        named = set(tokenizer.all_special_tokens)
        special = frozenset({str(token) for token in added if token.special} | named)
        return cls(any_of({str(token) for token in added} | named), special)

    def end_turns(self, text: str, end: int, *, after_call: bool) -> bool:
        """Whether the marker before `end` ends a turn. After a tool call, which may end in a
        marker of its own (`</tool_call>`), only special tokens and known ends do."""
        word = next((m[0] for m in self.pattern.finditer(text[:end]) if m.end() == end), None)
        known = word in self.special or word in (self.ends or ())
        return word is not None and (known or not after_call)

    def adjacent(self, text: str, at: int) -> re.Match[str] | None:
        """The next marker, if only white space lies between `at` and it, and it may end a turn."""
        match = self.pattern.search(text, at)
        if match is None or text[at : match.start()].strip():
            return None
        return match if self.ends is None or match[0] in self.ends else None


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches each of `words`, the longest first."""
    longest_first = sorted({word for word in words if word}, key=lambda word: (-len(word), word))
    return re.compile("|".join(re.escape(word) for word in longest_first) or r"(?!)")


@dataclass(frozen=True)
class TemplateLayout:
    """A rendered structure: literal, content, literal, content, ..., literal."""

    literals: tuple[str, ...]
    order: tuple[int, ...]  # the index of the message between literal n and literal n + 1
    trained: tuple[tuple[int, int, int, int], ...]  # start and end: index of a literal, offset
    ended: bool  # whether a marker ends the last trained turn
    all_ended: bool = True  # whether one ends each earlier trained turn
    opening: str = ""  # what prompts open an answer with, and trained turns lack

    def align(self, text: str, messages: Sequence[Message]) -> Spans:
        """The trained character spans of `text`, the rendered `messages`. Raises NotAligned."""
        starts: list[int] = []
        at = 0
        if not text.startswith(self.literals[0]):
            raise NotAligned("the beginning")
        for number, index in enumerate(self.order):
            starts.append(at)
            at += len(self.literals[number])
            after = self.literals[number + 1]
            is_last = number + 1 == len(self.order)
            end = _content_end(text, at, messages[index]["content"], after, is_last)
            if end < 0:
                raise NotAligned(f"message {index}")
            at = end
        starts.append(at)
        return [(starts[a] + i, starts[b] + j) for a, i, b, j in self.trained]


def _content_end(text: str, at: int, content: str, after: str, is_last: bool) -> int:
    """Where `content`, which begins at `at` and precedes `after`, ends; -1 if it is not there.

    Templates may change white space, so content is compared as it is, then trimmed, then without
    white space.
    """
    for candidate in (content, content.strip(), content.lstrip("\n"), content.rstrip()):
        end = at + len(candidate)
        fits = text.startswith(candidate, at) and text.startswith(after, end)
        if fits and (not is_last or end + len(after) == len(text)):
            return end
    expected = without_white_space(content)
    if is_last:
        end = len(text) - len(after)
        fits = text.endswith(after) and without_white_space(text[at:end]) == expected
        return end if fits else -1
    end = at
    for _ in range(100 if after else 0):
        end = text.find(after, end)
        if end < 0:
            return -1
        if without_white_space(text[at:end]) == expected:
            return end
        end += 1
    return -1


def without_white_space(text: str) -> str:
    """`text` without white space."""
    return "".join(text.split())


def common_prefix(left: str, right: str) -> int:
    """The length of the longest common prefix."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


@dataclass(frozen=True)
class _Placeholders:
    """A rendered conversation of placeholders."""

    text: str
    ends: dict[int, int]  # index of a message -> where its placeholder ends
    markers: list[tuple[int, int]]  # spans of the tokenizer's added tokens, such as <|im_end|>

    def begin(self, index: int) -> int | None:
        """Where the content of message `index` begins; None if it has none."""
        return self.ends[index] - len(placeholder(index)) if index in self.ends else None


def placeholder(index: int) -> str:
    """The placeholder of the content of message `index`: a word that no template contains."""
    return f"qz{index:05d}zq"


def learn(
    render: Render, messages: Sequence[Message], trained: Sequence[int], markers: Markers
) -> TemplateLayout:
    """The layout of `messages`, of which the turns `trained` are trained.

    Raises NotAligned, and the errors of `render`.
    """
    blanks = with_placeholders(messages)
    text = render(blanks, False)
    found = [match.span() for match in markers.pattern.finditer(text)]
    full = _Placeholders(text, find_placeholders(text, blanks), found)
    spans: Spans = []
    ended: list[bool] = []
    openings: set[str] = set()
    for index in trained:
        start, opening = _start(render, blanks, index, full)
        openings.add(opening)
        end, has_end = _end(render, blanks, index, full, start, markers)
        spans.append((start, end))
        ended.append(has_end)
    layout = cut(full.text, full.ends, spans, ended)
    return replace(layout, opening="".join(sorted(openings)))


def rewrites_history(render: Render) -> bool:
    """Whether an earlier answer is rendered differently from the last one.

    Templates of reasoning models put empty reasoning before the last answer only.
    """
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    blanks = with_placeholders(turns)
    last, earlier = render(blanks[:2], False), render(blanks, False)
    a, b = find_placeholders(last, blanks[:2]), find_placeholders(earlier, blanks)
    return last[a[0] : a[1]] != earlier[b[0] : b[1]]


def with_placeholders(messages: Sequence[Message]) -> list[Message]:
    """`messages` with a placeholder for every content that is not empty."""
    return [
        message | {"content": placeholder(index)} if message["content"] else message
        for index, message in enumerate(messages)
    ]


def cut(text: str, ends: dict[int, int], spans: Spans, ended: Sequence[bool]) -> TemplateLayout:
    """The layout of `text`, whose placeholders end at `ends`, with the trained `spans`; `ended`
    tells of each trained turn whether a marker ends it."""
    order = sorted(ends, key=lambda index: ends[index])
    literals: list[str] = []
    starts: list[int] = []
    at = 0
    for index in order:
        starts.append(at)
        literals.append(text[at : ends[index] - len(placeholder(index))])
        at = ends[index]
    starts.append(at)
    literals.append(text[at:])

    def locate(position: int) -> tuple[int, int]:
        for number, (start, literal) in enumerate(zip(starts, literals, strict=True)):
            if start <= position <= start + len(literal):
                return number, position - start
        raise NotAligned("an answer")

    trained = tuple((*locate(start), *locate(end)) for start, end in spans)
    return TemplateLayout(tuple(literals), tuple(order), trained, all(ended[-1:]), all(ended[:-1]))


def find_placeholders(text: str, messages: Sequence[Message]) -> dict[int, int]:
    """Where each message's placeholder ends. Raises NotAligned unless each occurs once."""
    ends: dict[int, int] = {}
    for index, message in enumerate(messages):
        if message["content"]:
            word = placeholder(index)
            if text.count(word) != 1:
                raise NotAligned(f"message {index} (role {message['role']})")
            ends[index] = text.index(word) + len(word)
    return ends


def _anchor(full: _Placeholders, index: int) -> tuple[int | None, int]:
    """The last message with content before turn `index`, and where that content ends."""
    own = full.begin(index)
    before = [
        (end, other)
        for other, end in full.ends.items()
        if other != index and (end <= own if own is not None else other < index)
    ]
    end, other = max(before, default=(0, -1))
    return (other if before else None), end


def _start(
    render: Render, messages: list[Message], index: int, full: _Placeholders
) -> tuple[int, str]:
    """Where the answer begins: after the generation prompt; and what the prompt has beyond it."""
    own = full.begin(index)
    before, anchor = _anchor(full, index)
    if index == 0:
        if own is None:
            raise NotAligned(f"message {index}")
        return own, ""
    after = render(messages[:index], True)
    if before is not None:
        word = placeholder(before)
        if word not in after:
            raise NotAligned(f"message {before}")
        after = after[after.index(word) + len(word) :]
    start = anchor + common_prefix(full.text[anchor:], after)
    for first, last in full.markers:  # a marker with a common prefix belongs to the answer
        if first < start < last:
            start = first
    start = start if own is None else min(start, own)
    return start, after[start - anchor :].strip()


def _end(
    render: Render,
    messages: list[Message],
    index: int,
    full: _Placeholders,
    start: int,
    markers: Markers,
) -> tuple[int, bool]:
    """Where the turn ends, and whether a marker ends it."""
    content_end = max(start, full.ends.get(index, start))
    end, tail = len(full.text), ""
    if index < len(messages) - 1:
        begin, tail = _alone(render, messages, index, full)
        end = begin + common_prefix(full.text[begin:], tail)
        tail = tail[content_end - begin :]
    inside = [last for first, last in full.markers if content_end <= first and last <= end]
    if index not in full.ends:  # a tool call holds markers itself; the last one ends it
        inside = inside or [last for first, last in full.markers if start <= first and last <= end]
    calls = bool(messages[index].get("tool_calls"))
    if inside and markers.end_turns(full.text, inside[-1], after_call=calls):
        return inside[-1], True
    at = inside[-1] if inside else content_end
    if index < len(messages) - 1 and (marker := markers.adjacent(full.text, at)):
        # either earlier turns end in a different marker than the last one,
        # or the marker of the next role is what ends a turn
        rest = tail[at - content_end :].lstrip()
        if markers.pattern.match(rest) or (
            not rest and messages[index + 1]["role"] != messages[index]["role"]
        ):
            return marker.end(), True
    for first, last in full.markers:
        if first < end < last:
            end = first
    return end, False


def _alone(
    render: Render, messages: list[Message], index: int, full: _Placeholders
) -> tuple[int, str]:
    """What follows turn `index` where it is the last one, and from which place of `full`: the end
    of its content, or of the content before it."""
    alone = render(messages[: index + 1], False)
    other: int | None = index
    begin = full.ends.get(index, 0)
    if index not in full.ends:
        other, begin = _anchor(full, index)
    word = placeholder(other) if other is not None else ""
    if word not in alone:
        raise NotAligned(f"message {other}")
    return begin, alone[alone.index(word) + len(word) :]


def check_complete(text: str, spans: Spans, conversation: Conversation) -> None:
    """Raise NotAligned unless the trained spans hold all of each trained turn, in order."""
    trained = without_white_space("".join(text[start:end] for start, end in spans))
    at = 0
    for index in conversation.trained:
        message = conversation.messages[index]
        thought = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
        for part in (thought, message["content"]):
            if isinstance(part, str):
                part = without_white_space(part)
                at = trained.find(part, at)
                if at < 0:
                    raise NotAligned(f"message {index} (role assistant)")
                at += len(part)
        calls = [call for call in message.get("tool_calls") or [] if isinstance(call, dict)]
        if any(_name(call) not in trained for call in calls):
            raise NotAligned(f"the tool call of message {index}")
    rendered = without_white_space(text)
    for tool in conversation.tools or ():
        if _name(tool) not in rendered:
            raise NotAligned(f"the tool {quoted(tool.get('function', tool).get('name', ''))}")


def _name(call: dict[str, Any]) -> str:
    """The name of a tool, or of the function that a call names, without white space."""
    return without_white_space(str(call.get("function", call).get("name", "")))
