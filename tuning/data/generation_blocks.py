"""The trained spans of templates that mark what they generate with `{% generation %}` blocks.

A template may leave the marker that ends a turn outside of its block, and may write several blocks
for one answer. Every answer is trained up to its end all the same, as it is with other templates:
an answer whose end is not trained never ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuning.data.template_layout import Markers, Message, Spans


def answers(
    text: str,
    blocks: Spans,
    messages: Sequence[Message],
    trained: Sequence[int],
    *,
    places: Mapping[int, int],
    markers: Markers,
) -> tuple[Spans, list[bool | None]]:
    """The trained spans of `text`, and of each trained answer whether a marker ends it; None for an
    answer without a block, which the template leaves untrained.

    `blocks` are the spans inside the template's own markers, `places` where the content of each
    message ends.
    """
    groups = _by_answer(blocks, messages, places)
    spans: Spans = []
    ended: list[bool | None] = []
    for index in trained:
        if not (group := groups.get(index)):
            ended.append(None)
            continue
        start, end = group[-1]
        end, has_end = _end(text, start, end, markers)
        spans += [*group[:-1], (start, end)]
        ended.append(has_end)
    return spans, ended


def _by_answer(
    blocks: Spans, messages: Sequence[Message], places: Mapping[int, int]
) -> dict[int, Spans]:
    """The blocks of each answer: of the one whose content a block holds or follows, else of the
    next one, whose reasoning or tool call it is."""
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    found: dict[int, Spans] = {}
    for start, end in blocks:
        last = max((n for n in places if places[n] <= start), default=-1)
        inside = [n for n in turns if n in places and start < places[n] <= end]
        following = [n for n in turns if n > last] or turns[-1:]
        owner = inside[0] if inside else last if last in turns else following[0]
        found.setdefault(owner, []).append((start, end))
    return found


def _end(text: str, start: int, end: int, markers: Markers) -> tuple[int, bool]:
    """Where an answer ends whose last block is [start, end), and whether a marker ends it."""
    inside = list(markers.pattern.finditer(text, start, end))
    closing = inside[-1] if inside and not text[inside[-1].end() : end].strip() else None
    if closing and (closing[0] in (markers.ends or ()) or closing[0] in markers.special):
        return closing.end(), True
    if outside := markers.adjacent(text, end):
        return outside.end(), True
    return (closing.end(), True) if closing else (end, False)
