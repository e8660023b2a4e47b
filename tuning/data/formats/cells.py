"""Values of cells, read the same in every type of file: JSON, turns of a chat, true or false.

A CSV file holds lists, truth values and numbers as text, so a text is read as what it spells.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tuning.data.formats.values import BadRow, quoted

ROLES = ("system", "user", "assistant", "tool")
ROLE = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
SHAREGPT_ROLE = ROLE | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
PRINTED = re.compile(r"\s*\[\s*\{\s*'")  # Python's print of a list: [{'role': ...
_OPENS = re.compile(r"\s*\[?\s*\{\s*[\"']")
_NAMES_ROLE = re.compile(
    rf"[\"'](?:role|from)[\"']\s*:\s*\[?\s*[\"'](?:{'|'.join(SHAREGPT_ROLE)})[\"']"
)
_NUMBERS = (bool, int, float, Decimal)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?")


class NotJson(ValueError):
    """JSON that Python's parser accepts and we reject: `args` are code, what, change."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises NotJson if a key stands twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        duplicate = next(key for key, count in counts.items() if count > 1)
        raise NotJson("DATA-208", f"the key {quoted(duplicate)} appears twice", "keep one")
    return value


def _constant(name: str) -> Any:
    raise NotJson("DATA-206", f"{name} is not a JSON value", "write null, or a number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        what = f"{quoted(text)[1:-1]} is beyond the numbers that are read: it would be Infinity"
        raise NotJson("DATA-206", what, "write a smaller number, or a text")
    return number


DECODER = json.JSONDecoder(
    object_pairs_hook=unique, parse_constant=_constant, parse_float=_finite
)  # strict: each key once, no NaN, no Infinity


def from_json(value: Any) -> Any:
    """`value`; parsed if it is text that holds a JSON array or object, as in CSV files."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError):
            return value
    return value


def turns_of(value: Any) -> Any:
    """The list of turns in a cell: JSON text, or the struct of lists that `datasets` may hold."""
    value = from_json(value)
    if not isinstance(value, Mapping) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns):
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def text_or_turns(value: Any, column: str) -> Any:
    """The cell of a column that may hold a text or a chat: turns, also of one turn, or `value`.

    A text is a chat if it is JSON of turns with roles. Raises BadRow for one that is meant to be
    and is not JSON, which would otherwise be trained letter by letter.
    """
    if not isinstance(value, str):
        turns = turns_of(value)
        return [turns] if isinstance(turns, Mapping) and {"role", "from"} & turns.keys() else turns
    if not _OPENS.match(value) or not _NAMES_ROLE.search(value):
        return value
    try:
        parsed = turns_of(DECODER.decode(value))
    except (ValueError, RecursionError) as error:
        what = f"{column} is a text that begins like a list of messages, and is not JSON"
        if PRINTED.match(value):
            what += ": it is Python's print of a list"
        elif isinstance(error, NotJson):
            what += f": {error.args[1]}"
        raise BadRow.of("DATA-216", what, "write it with json.dumps, or remove the row") from None
    turns = [parsed] if isinstance(parsed, Mapping) else parsed
    return turns if all(map(_has_role, turns)) else value


def _has_role(turn: Any) -> bool:
    if not isinstance(turn, Mapping):
        return False
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and role in SHAREGPT_ROLE


def holds_chat(value: Any, column: str) -> bool:
    """Whether a cell holds turns, in any form. Raises BadRow like `text_or_turns`."""
    turns = text_or_turns(value, column)
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, Mapping) and not {"role", "from"}.isdisjoint(first)


def is_truth(value: Any) -> bool:
    """Whether a cell is meant as true or false: a truth value, a number, or a text of either."""
    if isinstance(value, str):
        return truth(value) is not None or _NUMBER.fullmatch(value.strip()) is not None
    return isinstance(value, _NUMBERS)


def truth(value: Any) -> bool | None:
    """True or false, 1 or 0, or their text, in any file; None for anything else."""
    if isinstance(value, str):
        text = value.strip().lower()
        value = {"true": True, "false": False}.get(text)
        if _NUMBER.fullmatch(text):
            value = float(text)
    return bool(value) if isinstance(value, _NUMBERS) and value in (0, 1) else None
