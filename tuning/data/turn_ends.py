"""Which tokens end an answer: one rule for training, questions, chat, server, merge and card.

They are the ends that model and tokenizer name, and the markers that the chat template puts behind
an answer: behind the last one, behind an earlier one, and behind a tool call. Those are the tokens
that training teaches as an end. Many published models name only the end of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuning.data import template_layout
from tuning.data.chat_rewrites import folded
from tuning.data.template_layout import Markers, Message, NotAligned, RenderError

# (messages, tools, add_generation_prompt) -> text; raises RenderError
Render = Callable[[list[Message], list[Any] | None, bool], str]

_SYSTEM: Message = {"role": "system", "content": "be short"}
_ROUNDS: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
_NAME = "qzcallzq"
_CALL = {"name": _NAME, "arguments": {"a": 1}}
_TOOL = {"name": _NAME, "description": "adds", "parameters": {"type": "object", "properties": {}}}
_TOOLS = [{"type": "function", "function": _TOOL}]
_CALLED: list[Message] = [
    _ROUNDS[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": _CALL}],
    },
    {"role": "tool", "content": "five", "tool_call_id": "call00001", "name": _NAME},
    _ROUNDS[1],
]
_THOUGHT = "qzthoughtzq"


@dataclass(frozen=True)
class Ends:
    """Tokens that end an answer.

    Some (`inner`) also end a part of it, as gpt-oss ends its analysis and an earlier answer in the
    same token: they end the answer only after `opener`, which begins its last part.
    """

    ids: frozenset[int]
    inner: frozenset[int] = frozenset()
    opener: tuple[int, ...] = ()

    def reached(self, generated: Sequence[int]) -> bool:
        """Whether the last token of `generated` ends the answer."""
        if not generated or generated[-1] not in self.ids:
            return False
        if generated[-1] not in self.inner:
            return True
        before, size = list(generated[:-1]), len(self.opener)
        begin = max((n for n, token in enumerate(before) if token in self.inner), default=-1) + 1
        return any(tuple(before[n : n + size]) == self.opener for n in range(begin, len(before)))

    @property
    def certain(self) -> frozenset[int]:
        """Those that end an answer wherever they stand."""
        return self.ids - self.inner


def of(tokenizer: Any, render: Render | None, named: int | Iterable[int] | None) -> Ends:
    """The ends of `tokenizer` and of the template that `render` renders, if there is one.

    `named` is what the model's generation config calls its ends.
    """
    ids = {named} if isinstance(named, int) else set(named or ())
    ids.add(tokenizer.eos_token_id)
    known = frozenset(id for id in ids if id is not None)
    if render is None:
        return Ends(known)
    markers = learned(render, Markers.of(tokenizer))
    words = markers.ends or frozenset()
    ends = Ends(known | {tokenizer.convert_tokens_to_ids(word) for word in words})
    inner = _inner(render, markers) & words
    if not inner:
        return ends
    opener = tuple(tokenizer(_opener(render, markers), add_special_tokens=False)["input_ids"])
    inner_ids = frozenset(tokenizer.convert_tokens_to_ids(word) for word in inner) - known
    if not opener:  # an answer that only its thoughts begin cannot be told from them
        return Ends(ends.ids - inner_ids)
    return replace(ends, inner=inner_ids, opener=opener)


def folds_system(render: Render, markers: Markers) -> bool:
    """Whether the template leaves a system message out, refuses it, or moves it as turns follow,
    so that it has to be shown as the beginning of the first user turn."""
    for rounds in (_ROUNDS, _ROUNDS[:2]):
        turns = [_SYSTEM, *rounds]
        if _takes(render, turns, markers):
            return False
        if _takes(render, folded(turns), markers):
            return True
    return False


def learned(render: Render, markers: Markers) -> Markers:
    """`markers` with the ends of answers in the template that `render` renders."""
    words = _behind(render, _ROUNDS, None, markers)
    ends = replace(markers, ends=frozenset(words))
    called = _behind(render, _CALLED, _TOOLS, replace(markers, ends=None), known=words)
    return replace(ends, ends=frozenset(words | called))


def _behind(
    render: Render,
    messages: list[Message],
    tools: list[Any] | None,
    markers: Markers,
    *,
    known: Iterable[str] = (),
) -> set[str]:
    """The markers that end the answers in `messages`; none if the template does not take them."""
    layout = _layout(render, messages, tools, markers)
    if layout is None:
        return set()
    found: set[str] = set()
    for number, (_, _, literal, offset) in enumerate(layout.trained):
        text = layout.literals[literal][:offset]
        calls = bool(tools) and number == 0
        if calls:
            _, name, text = text.rpartition(_NAME)
            if not name:
                continue  # the template leaves the call out
        matches = list(markers.pattern.finditer(text))
        if not matches or matches[-1].end() != len(text):
            continue
        if not calls:  # the first of several, as in <|end|>\n</s>
            found |= {matches[0][0]} if not text[: matches[0].start()].strip() else set()
        elif matches[-1][0] not in markers.special | set(known):
            continue  # the call's own closing marker
        found.add(matches[-1][0])
    return found


def _takes(render: Render, turns: list[Message], markers: Markers) -> bool:
    trained = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    try:
        template_layout.learn(lambda some, ask: render(some, None, ask), turns, trained, markers)
    except (RenderError, NotAligned):
        return False
    return True


def _layout(
    render: Render, messages: list[Message], tools: list[Any] | None, markers: Markers
) -> template_layout.TemplateLayout | None:
    """The layout of `messages`, behind a system message if the template wants one."""

    def shown(turns: list[Message], ask: bool) -> str:
        return render(turns, tools, ask)

    for turns in (messages, [_SYSTEM, *messages], messages[:2], [_SYSTEM, *messages[:2]]):
        trained = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        try:
            return template_layout.learn(shown, turns, trained, markers)
        except (RenderError, NotAligned):
            if tools:
                return None
    return None


def _inner(render: Render, markers: Markers) -> frozenset[str]:
    """The markers between an answer's reasoning and the answer."""
    keys = template_layout.REASONING_KEYS
    turns = [_ROUNDS[0], _ROUNDS[1] | dict.fromkeys(keys, _THOUGHT)]
    blanks = template_layout.with_placeholders(turns)
    try:
        text = render(blanks, None, False)
        end = template_layout.find_placeholders(text, blanks)[1]
    except (RenderError, NotAligned):
        return frozenset()
    if (begin := text.find(_THOUGHT)) < 0:
        return frozenset()
    return frozenset(markers.pattern.findall(text[begin:end]))


def _opener(render: Render, markers: Markers) -> str:
    """What begins an answer without reasoning, after the generation prompt."""
    layout = _layout(render, _ROUNDS[:2], None, markers)
    if layout is None:
        return ""
    number, offset = layout.trained[0][:2]
    literal = layout.literals[number]
    return literal[offset:] if layout.order[number : number + 1] else ""
