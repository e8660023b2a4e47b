"""A prompt and its answer in columns of their own -> a pair, or a conversation."""

from __future__ import annotations

from typing import Any

from tuning.data.formats.cells import from_json
from tuning.data.formats.detect import (
    CONTEXT_COLUMNS,
    HISTORY_COLUMN,
    SYSTEM_COLUMNS,
    first_nonempty,
)
from tuning.data.formats.messages import required_text
from tuning.data.formats.values import (
    BadRow,
    Conversation,
    Fault,
    Pair,
    Row,
    Shape,
    text_faults,
    type_name,
)


def pair(row: Row, shape: Shape) -> Pair | Conversation:
    """The answer in the column `completion` of `shape`, with its prompt. Raises BadRow."""
    uses = dict(shape.columns)
    faults: list[Fault] = []
    values: dict[str, str] = {}
    for use, code in (("prompt", "DATA-221"), ("completion", "DATA-227")):
        try:
            values[use] = required_text(row, uses[use], code, empty=use == "prompt")
        except BadRow as bad:
            faults += bad.faults
    extra = {}
    for use, column in (
        ("context", first_nonempty(row, CONTEXT_COLUMNS) if shape.name == "alpaca" else None),
        ("system", first_nonempty(row, SYSTEM_COLUMNS)),
    ):
        if column is None:
            continue
        try:
            value = required_text(row, column, "", empty=True)
        except BadRow as bad:
            faults += bad.faults
            continue
        if value.strip():
            extra[use] = value
    earlier = from_json(row.get(HISTORY_COLUMN)) if shape.name == "alpaca" else None
    if earlier:
        faults += _history_faults(earlier)
    if faults:
        raise BadRow(faults)
    prompt, context, system = values["prompt"], extra.get("context"), extra.get("system", "")
    if context:
        prompt = f"{prompt}\n\n{context}"
    if earlier:
        return _continued(earlier, Pair(prompt, values["completion"], prompt, system))
    if shape.name == "prompt-completion":
        return Pair(prompt, values["completion"], bare_prompt(prompt, system), system, raw=True)
    bare = bare_prompt(_instruction(prompt), system)
    return Pair(prompt, values["completion"], bare, system)


def _history_faults(earlier: Any) -> list[Fault]:
    """Faults in the earlier turns of an Alpaca row: [[question, answer], ...]."""
    change = 'write [["question", "answer"], ...], or remove the column'
    if not isinstance(earlier, list):
        what = f"{HISTORY_COLUMN} is {type_name(earlier)}, not a list of pairs"
        return [Fault("DATA-216", what, change)]
    faults: list[Fault] = []
    for index, turn in enumerate(earlier):
        where = f"{HISTORY_COLUMN}[{index}]"
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            faults.append(Fault("DATA-216", f"{where} is not [question, answer]", change))
        elif not turn[1].strip():
            faults.append(Fault("DATA-225", f"the answer of {where} is empty", "write it"))
        else:
            faults += [fault for text in turn for fault in text_faults(text, where)]
    return faults


def _continued(earlier: list[list[str]], last_pair: Pair) -> Conversation:
    """The earlier turns and `pair` as one conversation, of which every answer is trained."""
    last = last_pair.as_conversation().messages
    turns = last[:-2]
    for question, answer in earlier:
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    turns += last[-2:]
    trained = tuple(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Conversation(turns, trained)


def bare_prompt(prompt: str, system: str) -> str:
    """The prompt for a model without a chat template: `system`, if there is one, before it."""
    return f"{system}\n\n{prompt}" if system.strip() else prompt


def _instruction(prompt: str) -> str:
    """The prompt in the Alpaca format, the most common one without a chat template."""
    return f"### Instruction:\n{prompt}\n\n### Response:\n"
