"""Ollama's Modelfile: files, template and stops.

Ollama renders no Jinja but Go templates. One is written where every turn of the chat template is a
prefix, its text and a suffix, and only if it gives the same text for conversations of all kinds.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from tuning.data.template_layout import Message, RenderError
from tuning.data.turn_ends import Render

SYSTEM, USER, ANSWER, AGAIN = "qzsystemqz", "qzuserqz", "qzanswerqz", "qzagainqz"
_ROUND: list[Message] = [
    {"role": "user", "content": USER},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": AGAIN},
]
_SYSTEM: Message = {"role": "system", "content": SYSTEM}


class Turns(NamedTuple):
    """What stands before and behind the text of each role."""

    head: str  # the BOS token, if the template begins with it
    start: str  # then, before a first turn that is no system message
    system: tuple[str, str] | None
    user: tuple[str, str]  # behind it what asks for an answer
    answer: tuple[str, str]

    def text(self, messages: list[Message]) -> str:
        """The prompt of `messages`."""
        first = messages[0]["role"] == "system"
        return self.head + ("" if first else self.start) + "".join(map(self._turn, messages))

    def _turn(self, message: Message) -> str:
        before, behind = {
            "system": self.system or ("", ""),
            "user": self.user,
            "assistant": self.answer,
        }[message["role"]]
        return f"{before}{message['content']}{behind}"

    def go(self, *, with_head: bool) -> str | None:
        """The Go template; None if Go would read a part of it. llama.cpp may add `head` itself."""
        (before, behind), start = self.system or ("", ""), self.start
        head = self.head if with_head else ""
        parts = (head, start, before, behind, *self.user, *self.answer)
        if any(mark in part for part in parts for mark in ("{{", "}}", '"""')):
            return None
        roles = {"user": self.user, "assistant": self.answer}
        if self.system is not None:
            roles = {"system": self.system} | roles
            if start:
                start = '{{ if ne (index .Messages 0).Role "system" }}' + start + "{{ end }}"
        cases = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
            for role, (before, behind) in roles.items()
        )
        return f"{head}{start}{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}"


def turns(render: Render, bos: str) -> Turns | None:
    """The turns of the template that `render` renders; None if it is not of that kind.

    `bos` is the text of the tokenizer's BOS token, empty for none.
    """
    try:
        start, first, second, end = _pieces(render(_ROUND, None, True), USER, ANSWER, AGAIN)
        if not first.startswith(end):
            return None
        head = bos if start.startswith(bos) else ""
        start = start.removeprefix(head)
        common = _common_end(start, second)
        system = None
        if (shown := _shown(render, [_SYSTEM, *_ROUND])) is not None:
            before, between, _ = _pieces(shown.partition(ANSWER)[0], SYSTEM, USER)
            common = _common_end(common, between)
            system = (before.removeprefix(head), between.removesuffix(common))
    except (RenderError, ValueError):
        return None
    answer = (first.removeprefix(end), second.removesuffix(common))
    found = Turns(head, start.removesuffix(common), system, (common, end), answer)
    tried = [_ROUND[:1], _ROUND, [*_ROUND, {"role": "assistant", "content": "x"}, _ROUND[0]]]
    tried += [[_SYSTEM, *each] for each in tried] if system else []
    same = all(_shown(render, each) == found.text(each) for each in tried)
    return found if same else None


def _pieces(text: str, *words: str) -> list[str]:
    """What stands between the `words`. Raises ValueError if they do not stand there once each."""
    pieces = []
    for word in words:
        before, _, text = text.partition(word)
        pieces.append(before)
    if [word for word in words if word in text] or any(w in p for w in words for p in pieces):
        raise ValueError("repeated")
    return [*pieces, text]


def _common_end(one: str, other: str) -> str:
    """The longest text that both end in."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    count = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return one[len(one) - count :]


def _shown(render: Render, messages: list[Message]) -> str | None:
    try:
        shown = render(messages, None, True)
    except RenderError:
        return None
    return shown if all(str(each["content"]) in shown for each in messages) else None


def text(
    *,
    model: str,
    adapter: str | None,
    render: Render | None,
    stops: list[str],
    bos: str,
    adds_bos: bool,
    note: str,
) -> str:
    """The Modelfile of the GGUF `model`, with `adapter` if there is one.

    `bos` is the text of the tokenizer's BOS token, which llama.cpp itself puts before a prompt if
    `adds_bos`. Each line of `note` becomes a comment, and so does what cannot be derived.
    """
    lines = [f"# {line}" for line in note.splitlines()]
    lines += [f"FROM {model}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    found = turns(render, bos) if render else None
    go = found.go(with_head=not adds_bos) if found else None
    if go is None:
        kind = "the chat template has no simple turns" if render else "there is no chat template"
        lines.append(f"# TEMPLATE is not derivable: {kind}. Write it as a Go template, or let")
        lines.append("# Ollama recognise the template in the GGUF; compare with tuning chat.")
    else:
        lines.append(f'TEMPLATE """{go}"""')
        if found and found.system is None:
            lines.append("# The chat template shows a system message as no turn: it is left out.")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and "\n" not in stop]
    return "\n".join(lines) + "\n"
