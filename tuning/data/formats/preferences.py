"""Rows that compare answers to one prompt (`chosen`, `rejected`) or rate one (`label`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuning.data.formats.cells import text_or_turns, truth
from tuning.data.formats.messages import (
    order_faults,
    prepend_system,
    read_messages,
    read_system,
    read_tools,
    required_text,
    trained_turns,
)
from tuning.data.formats.pairs import bare_prompt, pair
from tuning.data.formats.values import (
    BadRow,
    Conversation,
    Fault,
    Pair,
    Preference,
    Row,
    Shape,
    quoted,
    type_name,
)

Messages = list[dict[str, Any]]

SIDES = ("chosen", "rejected")
# Dialogues as running text, as Anthropic published theirs.
_DIALOGUE = re.compile(r"\n\n(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SAME = Fault(
    "DATA-259",
    "chosen and rejected are the same answer, so there is nothing to prefer",
    "remove the row, or write the two answers",
)


def preference(row: Row, shape: Shape) -> Preference:
    """The two answers in `row`, with the prompt that they share. Raises BadRow."""
    columns = [shape.column(side) for side in SIDES]
    sides = [text_or_turns(row[column], column) for column in columns]
    if faults := [f for c, side in zip(columns, sides, strict=True) for f in _empty(c, side)]:
        raise BadRow(faults)
    asked = dict(shape.columns).get("prompt")
    prompt = text_or_turns(row.get(asked), asked) if asked else None
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, list):
            sides = [[{"role": "assistant", "content": side}] for side in sides]
        elif prompt is None and all(map(_DIALOGUE.match, sides)):
            sides = [_dialogue(side) for side in sides]
        else:
            return _texts(row, shape, columns, sides, has_prompt=prompt is not None)
    elif not all(isinstance(side, list) for side in sides):
        kinds = " and ".join(type_name(side) for side in sides)
        what = f"{columns[0]} and {columns[1]} are {kinds}"
        raise BadRow.of("DATA-221", what, "write both as texts, or both as lists of messages")
    opening, faults = _opening(row, shape, prompt)
    return _chats(row, opening, dict(zip(columns, sides, strict=True)), faults)


def is_good(row: Row, shape: Shape) -> bool:
    """Whether the answer in `row` is rated good. Raises BadRow."""
    label = row[shape.column("label")]
    good = truth(label)
    if good is None:
        what = f"label is {quoted(label)}, neither true (a good answer) nor false"
        change = "write true or false, or rename the column if it says something else"
        raise BadRow.of("DATA-261", what, change)
    return good


def _empty(column: str, value: Any) -> list[Fault]:
    """The fault that an answer is missing or blank."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        code = "DATA-220" if value is None else "DATA-227"
        what = f"{column} is {'null' if value is None else 'empty'}"
        return [Fault(code, what, "write the answer, or remove the row")]
    return []


def _dialogue(text: str) -> Messages:
    _, *parts = _DIALOGUE.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in pairs]


def _texts(
    row: Row, shape: Shape, columns: list[str], sides: list[str], *, has_prompt: bool
) -> Preference:
    """Answers that are texts, to a prompt of its own or to the words with which both begin."""
    if has_prompt:
        name, prompt = shape.answer or "pair", shape.column("prompt")
        chosen, rejected = (
            _last_answer(pair(row, Shape(name, (("prompt", prompt), ("completion", column)), "")))
            for column in columns
        )
    else:
        texts = [required_text(row, column, "DATA-227") for column in columns]
        other = (n for n, each in enumerate(zip(*texts, strict=False)) if len({*each}) > 1)
        shared = texts[0][: next(other, min(map(len, texts)))]
        if texts[0] != texts[1]:  # up to a word, so that no token joins prompt and answer
            shared = shared[: max(map(shared.rfind, " \n\t")) + 1].rstrip()
        for column, text in zip(columns, texts, strict=True):
            if not text[len(shared) :].strip():
                raise BadRow([SAME] if texts[0] == texts[1] else _empty(f"the end of {column}", ""))
        system, faults = read_system(row)
        if faults:
            raise BadRow(faults)
        bare = bare_prompt(shared, system)
        chosen, rejected = (Pair(shared, t[len(shared) :], bare, system, raw=True) for t in texts)
    if chosen == rejected or sides[0].strip() == sides[1].strip():
        raise BadRow([SAME])
    return Preference(chosen, rejected)


def _last_answer(example: Pair | Conversation) -> Pair | Conversation:
    if isinstance(example, Conversation):
        return Conversation(example.messages, example.trained[-1:], example.tools)
    return example


def _chats(
    row: Row, opening: Messages, sides: Mapping[str, Any], faults: list[Fault]
) -> Preference:
    """Answers that are messages, behind their prompt; where they differ, answers begin."""
    whole: list[Messages] = []
    for column, value in sides.items():
        messages, wrong = read_messages(value, column, sharegpt=_is_sharegpt(value))
        if not wrong:
            messages, wrong = _prompted(opening, messages, column)
        whole.append(messages)
        faults = [*faults, *(wrong or order_faults(messages, column))]
    tools, tool_faults = read_tools(row)
    system, system_faults = read_system(row)
    faults = [*faults, *tool_faults, *system_faults]
    for messages in whole:
        if not faults:
            faults = prepend_system(messages, system)
    if faults:
        raise BadRow(list(dict.fromkeys(faults)))
    trained = [trained_turns(messages) for messages in whole]
    start = _first_difference(*whole)
    return Preference(
        *(
            Conversation(messages, tuple(n for n in own if n >= start), tools)
            for messages, own in zip(whole, trained, strict=True)
        )
    )


def _prompted(opening: Messages, messages: Messages, column: str) -> tuple[Messages, list[Fault]]:
    """The messages of an answer behind their prompt `opening`, none of which is lost or doubled."""
    if messages[0]["role"] not in ("user", "system"):
        return [*opening, *messages], []
    head = [each for each in opening[:1] if each["role"] == "system"]
    asked = opening[len(head) :]
    said, words = ([(m["role"], m["content"].strip()) for m in each] for each in (messages, asked))
    size = len(words)
    repeats = any(said[at : at + size] == words for at in range(len(said) - size))
    if repeats and head and messages[0]["role"] != "system":
        return [*head, *messages], []
    if repeats and (not head or messages[0] == head[0]):
        return messages, []
    what = f"{column} begins with a turn of the {messages[0]['role']}, and does not hold the prompt"
    change = "begin both answers with their prompt, or write the answers alone, or leave one out"
    return messages, [Fault("DATA-260", what, change)]


def _first_difference(chosen: Messages, rejected: Messages) -> int:
    """The index of the first message in which they differ, which must be an answer on both sides.

    Raises BadRow.
    """
    for number, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            if one["role"] == other["role"] == "assistant":
                return number
            what = f"message {number} differs between chosen and rejected, and is not an answer"
            break
    else:
        if len(chosen) == len(rejected):
            raise BadRow([SAME])
        what = "one of chosen and rejected is the beginning of the other"
    change = "give both the same prompt, and each its own answer, or remove the row"
    raise BadRow.of("DATA-260", what, change)


def _opening(row: Row, shape: Shape, prompt: Any) -> tuple[Messages, list[Fault]]:
    """The messages of a prompt, which may be a text, with the context of an Alpaca row."""
    if isinstance(prompt, list) and prompt:
        return read_messages(prompt, shape.column("prompt"), sharegpt=_is_sharegpt(prompt))
    if not isinstance(prompt, str) or not prompt.strip():
        return [], []
    if shape.answer != "alpaca":
        return [{"role": "user", "content": prompt}], []
    uses = (("prompt", shape.column("prompt")), ("completion", "completion"))
    asked = pair({**row, "completion": "-"}, Shape("alpaca", uses, ""))
    whole = asked.as_conversation() if isinstance(asked, Pair) else asked
    return whole.messages[:-1], []


def _is_sharegpt(turns: list[Any]) -> bool:
    first = turns[0]
    return isinstance(first, Mapping) and "from" in first and "role" not in first
