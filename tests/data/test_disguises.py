"""Rows in an unusual form are read as they are meant, or refused by the form's name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tuning.data.formats import BadRow, Columns, Conversation, detect, to_example

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [json.dumps(CALL)]},
    {"role": "tool", "content": "1"},
    TURNS[1],
]


def example(row: dict[str, Any]) -> Any:
    return to_example(row, detect(row, Columns()))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": {"role": ["user", "assistant"], "content": ["hi", "yes"]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "yes"]}},
        {"messages": json.dumps({"role": ["user", "assistant"], "content": ["hi", "yes"]})},
        {"messages": json.dumps(TURNS)},
    ],
)
def test_messages_as_a_struct_of_lists_are_read(row: dict[str, Any]) -> None:
    """As `datasets` keeps a sequence of structs, and CSV a list."""
    assert TURNS == example(row).messages


@pytest.mark.parametrize("tools", [[json.dumps(TOOL)], json.dumps([TOOL]), [TOOL]])
def test_tools_as_texts_are_read(tools: Any) -> None:
    """A list of JSON texts, one JSON text, or objects."""
    found = example({"messages": TURNS, "tools": tools})

    assert isinstance(found, Conversation)
    assert [TOOL] == found.tools


@pytest.mark.parametrize("calls", [[json.dumps(CALL)], json.dumps([CALL]), [CALL]])
def test_tool_calls_as_texts_are_read(calls: Any) -> None:
    """With arguments as an object, as chat templates print them."""
    turns = [TURNS[0], CALLS[1] | {"tool_calls": calls}, *CALLS[2:]]

    assert [CALL] == example({"messages": turns}).messages[1]["tool_calls"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ["a", "b"], "completion": ["x", "y"]},
        {"instruction": ["a", "b"], "input": ["", ""], "output": ["x", "y"]},
        {"prompt": {"0": "a", "1": "b"}, "completion": {"0": "x", "1": "y"}},
        {"columns": ["prompt", "completion"], "index": [0], "data": [["a", "x"]]},
        {"schema": {}, "columns": ["prompt"], "data": []},
    ],
)
def test_a_table_of_columns_is_named(row: dict[str, Any]) -> None:
    """pandas' orients, and a dictionary of lists: with the call that writes rows."""
    with pytest.raises(BadRow, match=r"kept by columns"):
        detect(row, Columns())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"messages": TURNS, "tags": ["a", "b"]},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"prompt": "a", "completion": "x", "tags": {"0": "z"}},
    ],
)
def test_a_row_with_lists_is_no_table(row: dict[str, Any]) -> None:
    """Lists of messages, of tokens, or beside texts."""
    assert example(row)


@pytest.mark.parametrize("text", [str(TURNS), f" {TURNS}", str([{"from": "human", "value": "hi"}])])
def test_pythons_print_of_a_list_is_named(text: str) -> None:
    """As pandas writes lists into CSV."""
    with pytest.raises(BadRow, match=r"Python's print of a list"):
        example({"messages": text})
