"""Detects the shape of a row, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from tuning.data.formats.cells import holds_chat, is_truth, text_or_turns, turns_of
from tuning.data.formats.masks import MASK_KEYS, ROW_MASKS, TOKEN_MASKS, row_mask
from tuning.data.formats.values import (
    EMPTY_VALUES,
    BadRow,
    Columns,
    Fault,
    Name,
    Row,
    Shape,
    quoted,
)

MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
PAIR_COLUMNS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
)
PREFERENCES = (
    ("chosen", "rejected"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
)
PROMPT_COLUMNS = (
    *("prompt", "question", "instruction", "query", "problem", "input", "user", "human"),
    *MESSAGE_COLUMNS,
)
CONTEXT_COLUMNS = ("input", "context")
HISTORY_COLUMN = "history"  # of Alpaca rows, as LLaMA-Factory has it: earlier [question, answer]
SYSTEM_COLUMNS = ("system", "system_prompt")
LEADING_COLUMNS = frozenset(MESSAGE_COLUMNS) | {name for pair in PAIR_COLUMNS for name in pair}
LEADING_COLUMNS |= {"prompt", "completion", "instruction", "text", "input_ids"}
KNOWN_COLUMNS = LEADING_COLUMNS | {
    *SYSTEM_COLUMNS,
    *CONTEXT_COLUMNS,
    HISTORY_COLUMN,
    "tools",
    "labels",
    "attention_mask",
    "label",
    *ROW_MASKS,
    *TOKEN_MASKS,
    *(name for pair in PREFERENCES for name in pair),
}
CARRIED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning")
_MAY_BE_CHATS = ("prompt", "completion", "chosen", "rejected")
MESSAGE_KEYS = {"role", "content", "from", "value", "function_call", *MASK_KEYS, *CARRIED}


def detect(row: Row, options: Columns) -> Shape:
    """The shape of `row`, by its columns and values.

    Raises BadRow if the columns fit no shape, or an option names a missing column.
    """
    if compared := _compared(row, options):
        return compared
    if options.named:
        return _by_options(row, options)
    if fault := _columns_table(row):
        raise BadRow([fault])
    if "input_ids" in row:
        return _shape("tokens", "it has a column input_ids", input_ids="input_ids")
    for column in MESSAGE_COLUMNS:
        if column in row and (column == "messages" or _is_chat(row[column])):
            return _chat_shape(row, column, f'it has a column "{column}"')
    if "prompt" in row and "completion" in row:
        return _pair_shape("prompt-completion", "prompt", "completion")
    if "instruction" in row:
        for answer in ("output", "response"):
            if answer in row:
                return _pair_shape("alpaca", "instruction", answer)
    for prompt, completion in PAIR_COLUMNS:
        if prompt in row and completion in row:
            return _pair_shape("pair", prompt, completion)
    if "text" in row:
        return _shape("text", 'it has a column "text" and none of the others', text="text")
    raise BadRow([_no_shape(row)])


def _columns_table(row: Row) -> Fault | None:
    """The fault that a row is a whole table, kept by its columns and not by its rows."""
    values = list(row.values())
    numbered = [value for value in values if isinstance(value, Mapping) and "0" in value]
    listed = [
        value
        for value in values
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    ]
    split = {"columns", "data"} <= row.keys() <= {"columns", "data", "index", "schema"}
    alike = len({len(value) for value in (numbered or listed)}) == 1
    if not split and not (
        len(values) > 1 and len(values) in (len(numbered), len(listed)) and alike
    ):
        return None
    return Fault(
        "DATA-212",
        "is a table kept by columns, not rows",
        'write one JSON object a row: df.to_json(path, orient="records", lines=True)',
    )


def _compared(row: Row, options: Columns) -> Shape | None:
    """The shape of a row that compares or rates answers, or None. Raises BadRow."""
    asked = options.objective
    if options.named and asked in (None, "sft"):  # the good column is named
        return None
    sides, misspelled = _sides(tuple(row))
    if sides:
        return _preference_shape(row, options, *sides)
    label = row.get("label")
    triple = {"prompt", "completion", "label"} <= row.keys() and is_truth(label)
    if (triple and asked in (None, "sft")) or (asked == "kto" and "label" in row):
        rest = {name: value for name, value in row.items() if name != "label"}
        answer = detect(rest, replace(options, objective=None))
        columns = (*answer.columns, ("label", "label"))
        reason = f'{answer.reason}, and a column "label"'
        return Shape("rated", columns, reason, answer.required | {"label"}, answer.name)
    for name, near in misspelled.items():
        if fault := missing_column(row, "this row has no", name, near=near):
            raise BadRow([fault])
    if asked in ("dpo", "kto"):
        has = ", ".join(quoted(name) for name in list(row)[:12])
        wanted = '"chosen" and "rejected"' if asked == "dpo" else '"label", or "chosen", "rejected"'
        what = f"objective is {asked}, which needs {wanted}, and the columns are {has}"
        raise BadRow.of("DATA-263", what, "add them, or leave DatasetConfig.objective out")
    return None


@lru_cache(maxsize=64)  # rows of a file have few sets of columns
def _sides(names: tuple[str, ...]) -> tuple[tuple[str, str] | None, dict[str, str]]:
    """The two columns of answers among `names`, and those that are written otherwise."""
    for pair in PREFERENCES:
        if {*pair} <= {*names}:
            return pair, {}
    spelled = {name.strip().lower(): name for name in names}
    near = (pair for pair in PREFERENCES if {*pair} <= spelled.keys())
    return None, {name: spelled[name] for name in next(near, ())}


def _preference_shape(row: Row, options: Columns, chosen: str, rejected: str) -> Shape:
    """The shape of a row with the answers `chosen` and `rejected`, and perhaps their prompt."""
    columns = {"chosen": chosen, "rejected": rejected}
    reason = f'it has the columns "{chosen}" and "{rejected}"'
    own = options.messages or options.context
    if own and (fault := missing_column(row, "the prompt's column is", own)):
        raise BadRow([fault])
    prompt = own or first_nonempty(row, PROMPT_COLUMNS)
    named: dict[str, Name] = {"prompt": "prompt-completion", "instruction": "alpaca"}
    if prompt:
        columns["prompt"] = prompt
        reason += f' to "{prompt}"'
    answer = named.get(prompt or "", "pair")
    return replace(_shape("preference", reason, **columns), answer=answer)


def unused(row: Row, shape: Shape) -> list[str]:
    """Ignored columns, and keys of messages, that look intentional."""
    used = {column for _, column in shape.columns} | row_mask(row, shape).keys()
    chats = [
        column
        for use, column in shape.columns
        if use == "messages" or (use in _MAY_BE_CHATS and holds_chat(row.get(column), column))
    ]
    if chats:
        used.add("tools")
    if shape.name == "tokens":
        used |= {"labels", "attention_mask", "token_type_ids", "position_ids", *TOKEN_MASKS}
    elif "text" not in (shape.name, shape.answer):
        used.add(first_nonempty(row, SYSTEM_COLUMNS) or "")
    asked = dict(shape.columns).get("prompt")
    if "alpaca" in (shape.name, shape.answer) and asked not in chats:
        used |= {first_nonempty(row, CONTEXT_COLUMNS) or "", HISTORY_COLUMN}
    ignored = [  # a table's own columns, such as its index, begin with two underscores
        name
        for name, value in row.items()
        if name not in used and not name.startswith("__") and not _is_empty(value)
    ]
    for column in chats:
        turns = text_or_turns(row.get(column), column)
        mappings = turns if isinstance(turns, list) else ()
        keys = dict.fromkeys(
            key
            for turn in mappings
            if isinstance(turn, Mapping) and not MESSAGE_KEYS.issuperset(turn)
            for key, value in turn.items()
            if key not in MESSAGE_KEYS and not _is_empty(value)
        )
        ignored += [f"{column}[].{key}" for key in keys]
    return ignored


def first_nonempty(row: Row, columns: Sequence[str]) -> str | None:
    """The first of `columns` that is not empty in this row."""
    for column in columns:
        if column in row and not _is_empty(row[column]):
            return column
    return None


def _is_empty(value: Any) -> bool:
    return any(value is empty or value == empty for empty in EMPTY_VALUES)


def _shape(name: Name, reason: str, **columns: str) -> Shape:
    return Shape(name, tuple(columns.items()), reason, frozenset(columns.values()))


def _pair_shape(name: Name, prompt: str, completion: str) -> Shape:
    reason = f'it has the columns "{prompt}" and "{completion}"'
    return _shape(name, reason, prompt=prompt, completion=completion)


def _is_chat(value: Any) -> bool:
    value = turns_of(value)
    return isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)


def _chat_shape(row: Row, column: str, reason: str) -> Shape:
    turns = turns_of(row[column])
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, Mapping) and "from" in first and "role" not in first:
        return _shape("sharegpt", f"{reason} of from/value turns", messages=column)
    return _shape("messages", f"{reason} of role/content turns", messages=column)


def _by_options(row: Row, options: Columns) -> Shape:
    named = {
        "messages_column": options.messages,
        "context_column": options.context,
        "response_column": options.response,
    }
    missing = [
        missing_column(row, f"{option} is", column) for option, column in named.items() if column
    ]
    if faults := [fault for fault in missing if fault]:
        raise BadRow(faults)
    if options.messages:
        return _chat_shape(row, options.messages, f'messages_column is "{options.messages}"')
    if options.context and options.response:
        reason = f'context_column is "{options.context}", response_column "{options.response}"'
        return _shape("pair", reason, prompt=options.context, completion=options.response)
    if options.response:
        reason = f'response_column is "{options.response}" and context_column is unset'
        return _shape("text", reason, text=options.response)
    raise BadRow.of(
        "DATA-251",
        f'context_column is "{options.context}" but response_column is unset',
        "set DatasetConfig.response_column to the column that holds the answer",
    )


def missing_column(row: Row, intro: str, column: str, *, near: str | None = None) -> Fault | None:
    """The fault that `row` lacks `column`, or None. `intro` begins the message."""
    if column in row:
        return None
    shown = ", ".join(quoted(name) for name in list(row)[:12])
    near = near or next((name for name in row if name.lower() == column.lower()), None)
    if near is not None:
        what = f'{intro} "{column}", but the column is written {quoted(near)}'
        return Fault("DATA-213", what, f"write {quoted(near)} exactly as in the data")
    what = f'{intro} "{column}", and there is no such column; there are {shown}'
    return Fault("DATA-250", what, "name an existing column")


def _no_shape(row: Row) -> Fault:
    shown = ", ".join(quoted(name) for name in list(row)[:12]) or "none"
    for name in row:
        if name not in LEADING_COLUMNS and name.strip().lower() in LEADING_COLUMNS:
            return Fault(
                "DATA-213",
                f'column {quoted(name)} is not written "{name.strip().lower()}"',
                f'rename it to "{name.strip().lower()}", or name it in DatasetConfig '
                "(messages_column, or context_column and response_column)",
            )
    return Fault(
        "DATA-212",
        f"the columns ({shown}) fit no known shape",
        "use messages, prompt/completion, instruction/output, question/answer or text, or name "
        "yours in DatasetConfig: messages_column, or context_column and response_column",
    )
