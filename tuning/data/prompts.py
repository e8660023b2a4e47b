"""Messages -> the text before an answer, as training renders it: for questions, chat and server.

One function makes template input of a message (formats/messages.py), one says how a system message
is shown, which variant of a template is used, and which date a template prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning.data import turn_ends
from tuning.data.chat_rewrites import folded, with_clock
from tuning.data.formats import BadRow, quoted
from tuning.data.formats.messages import message
from tuning.data.template_layout import Markers, Message, RenderError
from tuning.data.tokenizer import load_tokenizer, own_template
from tuning.data.turn_ends import Ends
from tuning.errors import SpecError


class Prompts:
    """A tokenizer with the program that renders its chat template."""

    def __init__(
        self, tokenizer: Any, render: turn_ends.Render, *, named: int | Iterable[int] | None
    ) -> None:
        """`named` is what the model's generation config calls the ends of an answer."""
        self._render = render
        self._folds = turn_ends.folds_system(render, Markers.of(tokenizer))
        self.ends = turn_ends.of(tokenizer, render, named)

    def text(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
        """The text of `messages`, up to where the answer begins.

        Raises BadRow for a message that no template takes, and the errors of the renderer.
        """
        turns = template_input(messages)
        return self._render(folded(turns) if self._folds else turns, tools, True)


def question(
    tokenizer: Any,
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    named: int | Iterable[int] | None,
) -> tuple[str, Ends]:
    """The text of `messages` through `template`, and what ends the answer. Raises SpecError."""
    if template is None:
        what = "has no chat template"
        change = "use an instruct model, or set ModelConfig.chat_template"
        raise SpecError.at("MODEL-211", tokenizer.name_or_path, what, change)
    prompts = Prompts(tokenizer, renderer(tokenizer, template), named=named)
    try:
        return prompts.text(messages), prompts.ends
    except (RenderError, BadRow) as error:
        what = f"has a chat template that refuses the question: {quoted(str(error))}"
        change = "ask otherwise, or set ModelConfig.chat_template"
        raise SpecError.at("MODEL-212", tokenizer.name_or_path, what, change) from error


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Refuse questions that the chat template cannot show; see the package. Raises SpecError."""
    template = request.get("chat_template")
    tokenizer = load_tokenizer(Path(request["base"]), request.get("new_tokens") or (), template)
    template = template or own_template(tokenizer)
    for asked in request["questions"]:
        question(tokenizer, template, [{"role": "user", "content": asked}], named=None)
    return {}


def template_input(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """`messages` as chat templates take them. Raises BadRow with all faults."""
    turns: list[Message] = []
    faults = []
    for index, written in enumerate(messages):
        turn, wrong = message(written, f"messages[{index}]")
        turns.append(turn)
        faults += [fault for fault in wrong if fault.code != "DATA-225"]  # an empty answer
    if faults:
        raise BadRow(faults)
    return turns


def renderer(tokenizer: Any, template: str) -> turn_ends.Render:
    """Renders `template` in this process."""
    text = with_clock(template)

    def render(messages: list[Message], tools: list[Any] | None, ask: bool) -> str:
        try:
            shown: str = tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=text,
                add_generation_prompt=ask,
                tokenize=False,
            )
        except Exception as error:  # an untrusted program may raise anything
            raise RenderError(str(error)) from error
        return shown

    return render
