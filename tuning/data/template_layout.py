"""Where a chat template puts the words of a conversation, and which characters are trained.

A skeleton is learned once per structure (which roles, in which order) from a conversation whose
contents are placeholders. It says which literal text stands between the contents and which parts of
it the model itself has to say: everything after the header that the template writes when it asks
for an answer, up to and including the marker that ends the turn. A real conversation is then
rendered once and laid over the skeleton: all literals and contents have to be found, in order and
to the end, so that a template that rewrites contents is noticed and never trained wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Spans = list[tuple[int, int]]
# (messages, ask for an answer) -> text
Render = Callable[[list[Message], bool], str]


class Unplaced(Exception):
    """The template does not show a message, or not as it was written."""


@dataclass(frozen=True)
class Skeleton:
    """A rendered structure: literal, content, literal, content, ..., literal."""

    literals: tuple[str, ...]
    order: tuple[int, ...]  # the index of the message between literal n and literal n + 1
    marks: tuple[tuple[int, int, int, int], ...]  # start and end: number of a literal, offset in it
    ended: bool  # whether a marker ends the last trained turn

    def place(self, text: str, messages: Sequence[Message]) -> Spans:
        """The trained character spans of `text`, the rendered `messages`. Raises Unplaced."""
        starts: list[int] = []
        at = 0
        if not text.startswith(self.literals[0]):
            raise Unplaced("the beginning")
        for number, index in enumerate(self.order):
            starts.append(at)
            at += len(self.literals[number])
            after = self.literals[number + 1]
            end = _fit(text, at, messages[index]["content"], after, number + 1 == len(self.order))
            if end < 0:
                raise Unplaced(f"message {index}")
            at = end
        starts.append(at)
        return [(starts[a] + i, starts[b] + j) for a, i, b, j in self.marks]


def _fit(text: str, at: int, content: str, after: str, last: bool) -> int:
    """Where `content`, which begins at `at`, ends, with `after` behind it; -1 if it is not there.

    Templates change white space at most, so a content is looked for as it is, then trimmed, and at
    last by its characters alone.
    """
    for words in (content, content.strip(), content.lstrip("\n"), content.rstrip()):
        end = at + len(words)
        fits = text.startswith(words, at) and text.startswith(after, end)
        if fits and (not last or end + len(after) == len(text)):
            return end
    if last:
        end = len(text) - len(after)
        return end if text.endswith(after) and squeeze(text[at:end]) == squeeze(content) else -1
    end, wanted = at, squeeze(content)
    for _ in range(100 if after else 0):
        end = text.find(after, end)
        if end < 0:
            return -1
        if squeeze(text[at:end]) == wanted:
            return end
        end += 1
    return -1


def squeeze(text: str) -> str:
    """`text` without white space."""
    return "".join(text.split())


def common_prefix(left: str, right: str) -> int:
    """The length of the longest text that both begin with."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


@dataclass(frozen=True)
class _Full:
    """A conversation of placeholders as the template shows it."""

    text: str
    ends: dict[int, int]  # index of a message -> where its placeholder ends
    markers: list[tuple[int, int]]  # places of the tokenizer's own tokens, such as <|im_end|>
    width: int

    def begin(self, index: int) -> int | None:
        """Where the content of message `index` begins; None if it has none."""
        return self.ends[index] - self.width if index in self.ends else None


def placeholder(index: int) -> str:
    """What stands for the content of message `index`: a word that no template contains."""
    return f"qz{index:05d}zq"


def learn(
    render: Render, messages: Sequence[Message], trained: Sequence[int], marker: re.Pattern[str]
) -> Skeleton:
    """The skeleton of `messages`, of which the turns `trained` are to be learned.

    `marker` finds the tokenizer's added tokens. Raises Unplaced, and what `render` raises.
    """
    blanks = blanked(messages)
    full = _full(render(blanks, False), blanks, marker)
    spans: Spans = []
    ended = True
    for index in trained:
        start = _start(render, blanks, index, full)
        end, ended = _end(render, blanks, index, full, start, marker)
        spans.append((start, end))
    return cut(full.text, full.ends, spans, ended)


def rewrites(render: Render) -> bool:
    """Whether an answer that is history looks different from the answer that is asked for.

    Templates of reasoning models put empty reasoning before the last answer only.
    """
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    blanks = blanked(turns)
    asked, whole = render(blanks[:2], False), render(blanks, False)
    one, two = (find_placeholders(asked, blanks[:2]), find_placeholders(whole, blanks))
    return asked[one[0] : one[1]] != whole[two[0] : two[1]]


def blanked(messages: Sequence[Message]) -> list[Message]:
    """`messages` with a placeholder for every content that is not empty."""
    return [
        message | {"content": placeholder(index)} if message["content"] else message
        for index, message in enumerate(messages)
    ]


def cut(text: str, ends: dict[int, int], spans: Spans, ended: bool) -> Skeleton:
    """The skeleton of `text`: its placeholders end at `ends`, its trained parts are `spans`."""
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
        raise Unplaced("an answer")

    marks = tuple((*locate(start), *locate(end)) for start, end in spans)
    return Skeleton(tuple(literals), tuple(order), marks, ended)


def find_placeholders(text: str, messages: Sequence[Message]) -> dict[int, int]:
    """Where the placeholder of each message ends in `text`. Raises Unplaced unless once each."""
    ends: dict[int, int] = {}
    for index, message in enumerate(messages):
        if message["content"]:
            word = placeholder(index)
            if text.count(word) != 1:
                raise Unplaced(f"message {index} (role {message['role']})")
            ends[index] = text.index(word) + len(word)
    return ends


def _full(text: str, messages: Sequence[Message], marker: re.Pattern[str]) -> _Full:
    markers = [match.span() for match in marker.finditer(text)]
    return _Full(text, find_placeholders(text, messages), markers, len(placeholder(0)))


def _anchor(full: _Full, index: int) -> tuple[int | None, int]:
    """The message whose content stands last before turn `index`, and where that content ends."""
    own = full.begin(index)
    before = [
        (end, other)
        for other, end in full.ends.items()
        if other != index and (end <= own if own is not None else other < index)
    ]
    end, other = max(before, default=(0, -1))
    return (other if before else None), end


def _start(render: Render, messages: list[Message], index: int, full: _Full) -> int:
    """Where the model begins to speak: behind the header that asks for an answer."""
    own = full.begin(index)
    before, anchor = _anchor(full, index)
    if index == 0:
        if own is None:
            raise Unplaced(f"message {index}")
        return own
    after = render(messages[:index], True)
    if before is not None:
        word = placeholder(before)
        if word not in after:
            raise Unplaced(f"message {before}")
        after = after[after.index(word) + len(word) :]
    start = anchor + common_prefix(full.text[anchor:], after)
    for first, last in full.markers:  # a marker that both begin alike belongs to the answer
        if first < start < last:
            start = first
    return start if own is None else min(start, own)


def _end(
    render: Render,
    messages: list[Message],
    index: int,
    full: _Full,
    start: int,
    marker: re.Pattern[str],
) -> tuple[int, bool]:
    """Where the turn ends, and whether a marker ends it."""
    spoken = max(start, full.ends.get(index, start))
    end = len(full.text)
    tail = ""
    if index < len(messages) - 1:
        alone = render(messages[: index + 1], False)
        own = placeholder(index)
        if index in full.ends:
            if own not in alone:
                raise Unplaced(f"message {index}")
            tail = alone[alone.index(own) + len(own) :]
            end = spoken + common_prefix(full.text[spoken:], tail)
        else:
            before, anchor = _anchor(full, index)
            word = placeholder(before) if before is not None else ""
            if word not in alone:
                raise Unplaced(f"message {before}")
            rest = alone[alone.index(word) + len(word) :]
            end = anchor + common_prefix(full.text[anchor:], rest)
            tail = rest[spoken - anchor :]
    inside = [last for first, last in full.markers if spoken <= first and last <= end]
    if index not in full.ends:  # a tool call: its own markers stand inside, the last one ends it
        inside = inside or [last for first, last in full.markers if start <= first and last <= end]
    if inside:
        return inside[-1], True
    following = next((m for m in full.markers if m[0] >= spoken), None)
    if following and tail and _begins_with_marker(tail, marker):
        between = full.text[spoken : following[0]]
        if not between.strip():  # earlier turns end in another marker than the last one
            return following[1], True
    for first, last in full.markers:
        if first < end < last:
            end = first
    return end, False


def _begins_with_marker(text: str, marker: re.Pattern[str]) -> bool:
    return marker.match(text.lstrip()) is not None
