"""One row of any known shape -> what is trained."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.data.formats import (
    UNREAD,
    BadRow,
    Columns,
    Conversation,
    Pair,
    Text,
    Tokens,
    detect,
    quoted,
    to_example,
    unused,
)

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be short."}
NONE = Columns()
BARE = "### Instruction:\n{}\n\n### Response:\n"
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
BARE_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
READ_CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}

CUT_CALL = {"function": {"name": "add", "arguments": '{"a": 2'}}
PROSE_CALL = {"from": "function_call", "value": '{"add": 2}'}

READ: dict[str, tuple[dict[str, Any], Columns, str, Any]] = {
    "messages": (
        {"messages": [USER, ANSWER]},
        NONE,
        "messages",
        Conversation([USER, ANSWER], (1,)),
    ),
    "messages, several turns": (
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
        NONE,
        "messages",
        Conversation([SYSTEM, USER, ANSWER, USER, ANSWER], (2, 4)),
    ),
    "messages, weights": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        NONE,
        "messages",
        Conversation([USER, ANSWER, USER, ANSWER], (3,)),
    ),
    "messages, content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, ANSWER]},
        NONE,
        "messages",
        Conversation([USER, ANSWER], (1,)),
    ),
    "messages, tools": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
                {"role": "tool", "content": "4", "tool_call_id": "1"},
                ANSWER,
            ],
            "tools": '[{"type": "function", "function": {"name": "add"}}]',
        },
        NONE,
        "messages",
        Conversation(
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [READ_CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "1"},
                ANSWER,
            ],
            (1, 3),
            [{"type": "function", "function": {"name": "add"}}],
        ),
    ),
    "messages, a call as OpenAI had it": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "content": "4", "name": "add"},
                ANSWER,
            ]
        },
        NONE,
        "messages",
        Conversation(
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [BARE_CALL]},
                {"role": "tool", "content": "4", "name": "add"},
                ANSWER,
            ],
            (1, 3),
        ),
    ),
    "messages, turns that are not trained": (
        {"messages": [USER, ANSWER | {"train": False}, USER, ANSWER | {"train": True}]},
        NONE,
        "messages",
        Conversation([USER, ANSWER, USER, ANSWER], (3,)),
    ),
    "messages, turns that are not trained, in numbers": (
        {"messages": [USER, ANSWER | {"train": 0}, USER, ANSWER | {"train": 1}]},
        NONE,
        "messages",
        Conversation([USER, ANSWER, USER, ANSWER], (3,)),
    ),
    "messages under another name": (
        {"conversations": [USER, ANSWER], "id": 1},
        NONE,
        "messages",
        Conversation([USER, ANSWER], (1,)),
    ),
    "messages by option": (
        {"talk": [USER, ANSWER], "text": "x"},
        Columns(messages="talk"),
        "messages",
        Conversation([USER, ANSWER], (1,)),
    ),
    "messages and a system column": (
        {"messages": [USER, ANSWER], "system": "Be short."},
        NONE,
        "messages",
        Conversation([SYSTEM, USER, ANSWER], (2,)),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "2 + 2?"},
                {"from": "gpt", "value": "4"},
            ]
        },
        NONE,
        "sharegpt",
        Conversation([SYSTEM, USER, ANSWER], (2,)),
    ),
    "sharegpt, a call": (
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ],
            "tools": '[{"name": "add", "description": "adds", "parameters": {}}]',
        },
        NONE,
        "sharegpt",
        Conversation(
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [BARE_CALL]},
                {"role": "tool", "content": "4"},
                ANSWER,
            ],
            (1, 3),
            [
                {
                    "type": "function",
                    "function": {"name": "add", "description": "adds", "parameters": {}},
                }
            ],
        ),
    ),
    "prompt-completion": (
        {"prompt": "2 + 2?", "completion": " 4"},
        NONE,
        "prompt-completion",
        Pair("2 + 2?", " 4", "2 + 2?", raw=True),
    ),
    "prompt-completion of messages": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        NONE,
        "prompt-completion",
        Conversation([USER, ANSWER, USER, ANSWER], (3,)),
    ),
    "prompt-completion of messages and a system column": (
        {"prompt": [USER], "completion": [ANSWER], "system": "Be short."},
        NONE,
        "prompt-completion",
        Conversation([SYSTEM, USER, ANSWER], (2,)),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        NONE,
        "alpaca",
        Pair("Add.\n\n2 + 2", "4", BARE.format("Add.\n\n2 + 2")),
    ),
    "alpaca without input": (
        {"instruction": "Add.", "input": "", "output": "4"},
        NONE,
        "alpaca",
        Pair("Add.", "4", BARE.format("Add.")),
    ),
    "alpaca with earlier turns": (
        {
            "instruction": "2 + 2?",
            "input": "",
            "output": "4",
            "system": "Be short.",
            "history": [["2 + 2?", "4"]],
        },
        NONE,
        "alpaca",
        Conversation([SYSTEM, USER, ANSWER, USER, ANSWER], (2, 4)),
    ),
    "dolly": (
        {"instruction": "Add.", "context": "2 + 2", "response": "4", "category": "sums"},
        NONE,
        "alpaca",
        Pair("Add.\n\n2 + 2", "4", BARE.format("Add.\n\n2 + 2")),
    ),
    "question and answer": (
        {"question": "2 + 2?", "answer": "4"},
        NONE,
        "pair",
        Pair("2 + 2?", "4", BARE.format("2 + 2?")),
    ),
    "system prompt, question, response": (
        {"system_prompt": "Be short.", "question": "2 + 2?", "response": "4"},
        NONE,
        "pair",
        Pair("2 + 2?", "4", "Be short.\n\n" + BARE.format("2 + 2?"), "Be short."),
    ),
    "query and response": (
        {"query": "2 + 2?", "response": "4"},
        NONE,
        "pair",
        Pair("2 + 2?", "4", BARE.format("2 + 2?")),
    ),
    "pair by options": (
        {"ask": "2 + 2?", "say": "4", "text": "x"},
        Columns(context="ask", response="say"),
        "pair",
        Pair("2 + 2?", "4", BARE.format("2 + 2?")),
    ),
    "text": ({"text": "Four."}, NONE, "text", Text("Four.")),
    "text by option": (
        {"body": "Four.", "text": "x"},
        Columns(response="body"),
        "text",
        Text("Four."),
    ),
    "tokens": ({"input_ids": [1, 2, 3]}, NONE, "tokens", Tokens([1, 2, 3], (0, 3))),
    "tokens and padding": (
        {"input_ids": [0, 1, 2, 0], "attention_mask": [0, 1, 1, 0], "labels": [0, -100, 2, 0]},
        NONE,
        "tokens",
        Tokens([1, 2], (1, 2)),
    ),
    "tokens and labels": (
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]},
        NONE,
        "tokens",
        Tokens([1, 2, 3, 4], (1, 2, 3, 4)),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_read(name: str) -> None:
    """Each shape is recognised, with a reason, and read as its author meant."""
    row, options, shape_name, expected = READ[name]

    shape = detect(row, options)

    assert shape_name == shape.name
    assert shape.reason
    assert expected == to_example(row, shape)


@pytest.mark.parametrize(
    ("row", "options", "code", "says"),
    [
        ({"text": "a"}, Columns(messages="talk"), "DATA-250", 'messages_column is "talk"'),
        ({"Talk": []}, Columns(messages="talk"), "DATA-213", 'written "Talk"'),
        ({"a": "x", "b": "y"}, Columns(context="a"), "DATA-251", "response_column is unset"),
        ({}, NONE, "DATA-212", "the columns (none) fit no known shape"),
        ({"prompt": "a", "Chosen": "b", "Rejected": "c"}, NONE, "DATA-213", '"Chosen"'),
    ],
)
def test_columns_that_fit_nothing(
    row: dict[str, Any], options: Columns, code: str, says: str
) -> None:
    """What is missing is named, with what is there."""
    with pytest.raises(BadRow) as error:
        detect(row, options)

    assert [code] == [fault.code for fault in error.value.faults]
    assert says in error.value.faults[0].what


def test_all_faults_of_a_row() -> None:
    """A person sees everything that is wrong with a row at once."""
    row = {"messages": [{"role": "bot", "content": 5}, {"content": "a"}, "x", {"role": "user"}]}

    with pytest.raises(BadRow) as error:
        to_example(row, detect(row, NONE))

    expected = ["DATA-207", "DATA-221", "DATA-218", "DATA-216", "DATA-219"]
    assert expected == [fault.code for fault in error.value.faults]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": [USER], "completion": "4"}, "DATA-221"),
        ({"prompt": "a", "completion": 5}, "DATA-221"),
        ({"question": None, "answer": "a"}, "DATA-220"),
        ({"instruction": "a", "output": "\n"}, "DATA-227"),
        ({"text": ""}, "DATA-227"),
        ({"input_ids": [1], "labels": [1, 2]}, "DATA-247"),
        ({"input_ids": [1], "labels": [5]}, "DATA-247"),
        ({"input_ids": ["1"]}, "DATA-247"),
        ({"input_ids": []}, "DATA-247"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "DATA-247"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "DATA-247"),
        ({"input_ids": [1], "attention_mask": [0]}, "DATA-247"),
        ({"messages": [USER, ANSWER], "tools": "add"}, "DATA-216"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "\ud800"}]}, "DATA-234"),
        ({"messages": [USER, ANSWER], "system": {"a": 1}}, "DATA-221"),
        ({"messages": [USER, ANSWER | {"reasoning_content": ["a"]}]}, "DATA-221"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "\ud800"}]}, "DATA-234"),
        ({"messages": "[" * 200_000}, "DATA-216"),
        ({"messages": [USER, ANSWER | {"train": "false"}]}, "DATA-221"),
        ({"messages": [USER, ANSWER | {"tool_calls": [CUT_CALL]}]}, "DATA-216"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call"}]},
            "DATA-219",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, PROSE_CALL]},
            "DATA-216",
        ),
        ({"instruction": "a", "input": 5, "output": "b"}, "DATA-221"),
        ({"instruction": "a", "input": ["b", 5], "output": "b"}, "DATA-222"),
        ({"question": "a", "answer": "b", "system": 0}, "DATA-221"),
        ({"instruction": "a", "output": "b", "history": "c"}, "DATA-216"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "DATA-216"),
        ({"instruction": "a", "output": "b", "history": [["c", " "]]}, "DATA-225"),
    ],
)
def test_bad_rows(row: dict[str, Any], code: str) -> None:
    """Rows of the right columns with the wrong things in them."""
    with pytest.raises(BadRow) as error:
        to_example(row, detect(row, NONE))

    assert [code] == [fault.code for fault in error.value.faults]


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"question": "a", "answer": "b", "context": "c", "id": 1}, ["context", "id"]),
        ({"instruction": "a", "output": "b", "input": "", "history": []}, []),
        ({"messages": [USER, ANSWER], "tools": [], "prompt": "a", "score": None}, ["prompt"]),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1]}, []),
        ({"instruction": "a", "output": "b", "input": "c", "context": "d"}, ["context"]),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "c"}]}, ["tools"]),
        ({"text": "a", "extra": UNREAD, "__index_level_0__": UNREAD}, ["extra"]),
        (
            {"messages": [USER, ANSWER | {"id": 1, "weight": 0, "train": False, "note": None}]},
            ["messages[].id"],
        ),
    ],
)
def test_columns_that_nobody_reads_are_known(row: dict[str, Any], left: list[str]) -> None:
    """They may have been meant; empty ones were not."""
    assert left == unused(row, detect(row, NONE))


def test_quoted() -> None:
    """Values are shown short, on one line, and harmless."""
    assert '"a\\u000ab"' == quoted("a\nb")
    assert 82 == len(quoted("x" * 500))
    assert "[1, 2]" == quoted([1, 2])


def test_a_row_of_the_same_shape_with_another_column_is_told_so() -> None:
    """Not "of shape alpaca, but the data began as alpaca"."""
    shape = detect({"instruction": "a", "output": "b"}, NONE)

    with pytest.raises(BadRow, match='this row has no "output"'):
        to_example({"instruction": "a", "response": "b"}, shape)


MASK_KEYS = ("weight", "train", "training", "train_on_turn")


@given(
    st.sampled_from(MASK_KEYS),
    st.sampled_from([0, 1, False, True, 0.0, 1.0, None]),
    st.booleans(),
)
def test_a_mask_key_is_honoured_wherever_it_stands(key: str, value: Any, in_part: bool) -> None:
    """0, 1, true, false and null, on an assistant turn or on its content part."""
    masked: dict[str, Any] = ANSWER | {key: value}
    if in_part:
        part = {"type": "text", "text": "4", key: value}
        masked = {"role": "assistant", "content": [part]}
    row = {"messages": [USER, masked, USER, ANSWER]}

    example = to_example(row, detect(row, NONE))

    trained = (3,) if value is not None and not value else (1, 3)
    assert Conversation([USER, ANSWER, USER, ANSWER], trained) == example


@given(
    st.sampled_from(MASK_KEYS),
    st.sampled_from([0.5, 2, -1, "false", "0", "x", [], {}, float("nan"), float("inf")]),
    st.sampled_from(["turn", "part", "question"]),
)
def test_a_mask_that_is_no_mask_is_refused(key: str, value: Any, place: str) -> None:
    """With the place in the row; nothing is trained in spite of it."""
    turns: list[Any] = [USER, ANSWER]
    if place == "part":
        turns[1] = {"role": "assistant", "content": [{"type": "text", "text": "4", key: value}]}
    else:
        at = 0 if place == "question" else 1
        turns[at] = turns[at] | {key: value}
    row = {"messages": turns}

    with pytest.raises(BadRow) as error:
        to_example(row, detect(row, NONE))

    assert ["DATA-221"] == [fault.code for fault in error.value.faults]
    assert key in error.value.faults[0].what


@pytest.mark.parametrize(
    "turns",
    [
        [USER | {"train": True}, ANSWER],
        [USER, ANSWER | {"weight": 1, "train": False}],
        [
            USER,
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "4", "train": False}, {"text": "5"}],
            },
        ],
    ],
)
def test_masks_that_contradict_are_refused(turns: list[Any]) -> None:
    """A question that is to be trained, two keys that disagree, half of an answer."""
    row = {"messages": turns}

    with pytest.raises(BadRow) as error:
        to_example(row, detect(row, NONE))

    assert ["DATA-255"] == [fault.code for fault in error.value.faults]


def test_an_untrained_question_stays_plain() -> None:
    """`weight` on a user turn (SlimOrca) leaves role and content, which templates render fast."""
    row = {"messages": [SYSTEM | {"weight": 0}, USER | {"weight": 0}, ANSWER | {"weight": 1}]}

    assert Conversation([SYSTEM, USER, ANSWER], (2,)) == to_example(row, detect(row, NONE))
