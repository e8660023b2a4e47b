"""What is trained of a row depends on the row alone: not on other rows, nor on the file's type."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chats
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.data.__main__ import work
from tuning.data.encode import Encoder
from tuning.data.file_encoder import FileEncoder, Input
from tuning.data.first_rows import check_file
from tuning.data.formats import BadRow, Columns, Conversation, Pair, Rated, detect, to_example
from tuning.data.problems import Problems
from tuning.data.sniff import FileType
from tuning.data.tokenizer import load_template, load_tokenizer
from tuning.errors import DataError

NONE = Columns()
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
OTHER = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be short."}
CALLED = {"name": "add", "arguments": {"a": 2}}

Row = dict[str, Any]
Outcome = list[tuple[int, list[int], list[int], bool]] | None  # None: refused


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ChatML tokenizer."""
    return chats.save("chatml", tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="session")
def encoder(base: Path) -> Encoder:
    """What makes tokens of rows."""
    tokenizer = load_tokenizer(base, (), None)
    return Encoder(tokenizer, load_template(tokenizer, None), train_on="assistant")


class Collector:
    """Keeps what is written to a file of rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Keep a batch."""
        self.rows += batch.to_pylist()


def write(path: Path, rows: Sequence[Row], kind: str) -> None:
    """Write `rows` as pandas would: a CSV file holds lists as JSON and truth as True or False."""
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = dict.fromkeys(name for row in rows for name in row)
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(names))
            table.writeheader()
            for row in rows:
                table.writerow(
                    {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                )


@pytest.fixture(scope="session")
def outcome(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """What is trained of each of the rows of a file, or None if the file is refused."""
    folder = tmp_path_factory.mktemp("files")

    def found(rows: Sequence[Row], kind: str = "jsonl") -> Outcome:
        path = folder / f"rows.{kind}"
        write(path, rows, kind)
        problems, collector = Problems(), Collector()
        file_encoder = FileEncoder(encoder, [NONE], problems, folder)
        file_encoder.encode(Input(0, path, path.name, FileType(kind)), collector)
        if len(problems):
            return None
        return [
            (row["place"] - (kind == "csv"), row["input_ids"], row["trained"], row["good"])
            for row in collector.rows
        ]

    return found


def some(**columns: Sequence[Any]) -> st.SearchStrategy[Row]:
    """Rows with some of `columns`, each with one of its values."""
    return st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in columns.items()})


ASKED = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
PAIRS = st.builds(
    lambda row, more: row | more,
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(["Two?", ASKED]), "completion": st.sampled_from(["one", "two"])}
    ),
    some(label=[None, "", True, False, 0, 1.0, "true", "sums"], weight=[0, 1, None], text=["x"]),
)
CHATS = st.builds(
    lambda row, more: row | more,
    st.sampled_from([{"messages": [USER, ANSWER]}, {"conversations": [USER, OTHER]}]),
    some(system=["", "Be short."], prompt=["a"], completion=["b"], train=[False, True, "False"]),
)
PREFERENCES = st.builds(
    lambda row, more: row | more,
    st.sampled_from(
        [
            {"chosen": "it is one", "rejected": "it is two"},
            {"chosen": [ANSWER], "rejected": [OTHER]},
            {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        ]
    ),
    some(prompt=[None, "", "2 + 2?"], question=["", "2 + 2?", "3?"], system=["Be short."]),
)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([PAIRS, CHATS, PREFERENCES, PAIRS | CHATS | PREFERENCES]))
def test_the_order_of_rows_changes_nothing(
    outcome: Callable[..., Outcome], data: Any, kind: st.SearchStrategy[Row]
) -> None:
    """Each row is trained as it is in any other order, or the file is refused in every order."""
    rows = data.draw(st.lists(kind, min_size=2, max_size=4))
    order = data.draw(st.permutations(range(len(rows))))

    straight, shuffled = outcome(rows), outcome([rows[n] for n in order])

    assert (straight is None) == (shuffled is None)
    if straight is not None and shuffled is not None:
        assert sorted(straight) == sorted((order[at - 1] + 1, *rest) for at, *rest in shuffled)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "prompt": st.sampled_from([[USER], [SYSTEM, USER]]),
                "completion": st.sampled_from([[ANSWER], [OTHER]]),
            }
        )
        | st.fixed_dictionaries(
            {"prompt": st.just("Two?"), "completion": st.sampled_from(["one", "two"])}
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([[], [True, False], [0, 1], [0.0, 1.0], [7]]),
    st.sampled_from([[], [True, False], [0, 1], [1.0, 0.5]]),
    st.data(),
)
def test_the_type_of_the_file_changes_nothing(
    outcome: Callable[..., Outcome],
    rows: list[Row],
    labels: list[Any],
    weights: list[Any],
    data: Any,
) -> None:
    """Turns, ratings and masks are read alike in JSONL, CSV and parquet."""
    rows = [row for row in rows if type(row["prompt"]) is type(rows[0]["prompt"])]
    for name, values in (("label", labels), ("weight", weights)):
        if values:
            rows = [row | {name: data.draw(st.sampled_from(values))} for row in rows]

    expected = outcome(rows)

    assert expected == outcome(rows, "csv")
    assert expected == outcome(rows, "parquet")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c", "label": False}],
        [
            {"prompt": "a", "completion": "b", "label": None},
            {"prompt": "a", "completion": "c", "label": False},
        ],
        [
            {"prompt": None, "chosen": "say a", "rejected": "say b"},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ],
        [{"text": "a"}, {"text": "a", "question": "b", "answer": "c"}],
    ],
)
def test_a_row_that_means_something_else_is_refused(rows: list[Row], tmp_path: Path) -> None:
    """The first row decides for the file, and a later one that would be read otherwise is named."""
    path = tmp_path / "a.jsonl"
    write(path, rows, "jsonl")

    with pytest.raises(DataError, match=r"DATA-214 a\.jsonl line 2: the row is of shape"):
        check_file(path, "a.jsonl", columns=NONE, extension=None)


def test_what_is_not_read_is_counted_wherever_it_stands(base: Path, tmp_path: Path) -> None:
    """Columns and keys of messages that first appear after the first row, and rows left out."""
    rows: list[Row] = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER | {"tone": "dry"}], "context": "sums"},
        {"messages": [USER, ANSWER], "context": "sums"},
        {"messages": [USER, OTHER], "weight": 0},
    ]
    path = tmp_path / "a.jsonl"
    write(path, rows, "jsonl")
    request = {"step": "tokenise", "files": [{"path": str(path), "shown": "a.jsonl"}]}

    result = work(request | {"base": str(base), "out": str(tmp_path / "out"), "settings": {}})

    assert 3 == result["rows"]
    assert [
        'not read: the columns "context" (2 rows), "messages[].tone" (1 rows)',
        "1 rows left out: weight says that they are not trained",
    ] == result["notes"]
    said = str(check_file(path, "a.jsonl", columns=NONE, extension=None))
    assert said.endswith('not read: "context", "messages[].tone"')


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
def test_prompts_that_are_rendered_and_prompts_that_are_not_do_not_mix(
    order: list[int], outcome: Callable[..., Outcome]
) -> None:
    """Whichever come first, none is trained without the template that the others have."""
    rows = [{"prompt": ASKED, "completion": "one"}, {"prompt": "Two?", "completion": "two"}]

    assert outcome([rows[n] for n in order]) is None
    assert outcome([rows[0], rows[0]]) and outcome([rows[1], rows[1]])


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (0, False), (1.0, True), ("False", False), (" true ", True), ("0.0", False)],
)
def test_a_rating_is_detected_as_it_is_read(label: Any, good: bool) -> None:
    """Truth values and numbers, and the texts of them that pandas writes into CSV."""
    row = {"prompt": "a", "completion": "b", "label": label}

    assert Rated(Pair("a", "b", "a", raw=True), good) == to_example(row, detect(row, NONE))


@pytest.mark.parametrize("label", [7, "7", 0.5, "0.5", float("nan")])
def test_a_number_that_rates_nothing_is_refused(label: Any) -> None:
    """In CSV as in JSONL."""
    row = {"prompt": "a", "completion": "b", "label": label}

    with pytest.raises(BadRow, match="neither true"):
        to_example(row, detect(row, NONE))


TURNS = [USER, ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"prompt": json.dumps(USER), "completion": [ANSWER]},
        {"prompt": [USER], "completion": json.dumps({"role": ["assistant"], "content": ["4"]})},
    ],
)
def test_turns_as_text_are_turns(row: Row) -> None:
    """JSON of messages in prompt and completion, as preferences have it."""
    assert Conversation(TURNS, (1,)) == to_example(row, detect(row, NONE))


@pytest.mark.parametrize("text", ['[{"a": 1}]', '{"role": "admin"}', "[1, 2]", "[x", '{"role": 5}'])
@pytest.mark.parametrize("columns", [("completion",), ("chosen", "rejected")])
def test_other_json_is_a_text(text: str, columns: tuple[str, ...]) -> None:
    """Answers may be JSON; only turns with roles are a chat."""
    row = {"prompt": "a"} | {name: text + " " * n + str(n) * n for n, name in enumerate(columns)}

    example = to_example(row, detect(row, NONE))

    assert text == getattr(example, "chosen", example).completion


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (str([ANSWER]), "Python's print of a list"),
        ('[{"role": "assistant", "content": "4"', "is not JSON"),
        ('[{"role": "assistant", "content": "4", "score": NaN}]', "NaN is not a JSON value"),
        ('[{"role": "assistant", "role": "user", "content": "4"}]', '"role" appears twice'),
    ],
)
@pytest.mark.parametrize("columns", [("prompt", "completion"), ("chosen", "rejected")])
def test_turns_that_are_not_json_are_refused(
    text: str, says: str, columns: tuple[str, str]
) -> None:
    """Nothing that was meant as messages is trained letter by letter."""
    row = dict.fromkeys(columns, text)

    with pytest.raises(BadRow, match=says):
        to_example(row, detect(row, NONE))


@pytest.mark.parametrize("columns", [("question", "answer"), ("instruction", "output"), ("text",)])
def test_a_list_of_texts_is_no_text(columns: tuple[str, ...]) -> None:
    """Several answers are not one of several lines; a list of one text is that text."""
    row = dict.fromkeys(columns, "who?")
    several, one = row | {columns[-1]: ["Ada", "Ada L."]}, row | {columns[-1]: ["Ada"]}

    with pytest.raises(BadRow, match="is a list of 2 texts"):
        to_example(several, detect(row, NONE))
    assert to_example(row | {columns[-1]: "Ada"}, detect(row, NONE)) == to_example(
        one, detect(row, NONE)
    )


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        ([SYSTEM, USER], [], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ("2 + 2? ", [USER], [USER]),
        ("2 + 2?", [SYSTEM, USER], [SYSTEM, USER]),
        ("2 + 2?", [USER, ANSWER, USER], [USER, ANSWER, USER]),
    ],
)
def test_a_preference_keeps_its_prompt(prompt: Any, before: list[Any], expected: list[Any]) -> None:
    """It stands before the answers, or they hold it already: nothing is lost, nothing doubled."""
    row = {"prompt": prompt, "chosen": [*before, ANSWER], "rejected": [*before, OTHER]}

    example = to_example(row, detect(row, NONE))

    assert [*expected, ANSWER] == example.chosen.messages
    assert [*expected, OTHER] == example.rejected.messages


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("3 + 3?", [USER]),
        ([SYSTEM, USER], [SYSTEM | {"content": "Be long."}, USER]),
        ([USER, ANSWER], [USER]),
    ],
)
def test_a_prompt_that_is_not_that_of_the_answers_is_refused(
    prompt: Any, before: list[Any]
) -> None:
    """Rather than ignored."""
    row = {"prompt": prompt, "chosen": [*before, ANSWER], "rejected": [*before, OTHER]}

    with pytest.raises(BadRow, match="does not hold the prompt"):
        to_example(row, detect(row, NONE))


def test_the_input_of_an_instruction_is_part_of_a_preference_s_prompt() -> None:
    """Of answers that are messages as of answers that are texts."""
    row = {"instruction": "Add.", "input": "2 + 2", "chosen": [ANSWER], "rejected": [OTHER]}

    example = to_example(row, detect(row, NONE))

    assert "Add.\n\n2 + 2" == example.chosen.messages[0]["content"]


def test_answers_that_only_a_mask_tells_apart_are_the_same() -> None:
    """A mask key is no words."""
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"weight": 0}]}

    with pytest.raises(BadRow, match="the same answer"):
        to_example(row, detect(row, NONE))


@pytest.mark.parametrize("at", [0, 1])
def test_a_system_column_beside_another_system_message_is_refused(at: int) -> None:
    """Wherever the other one stands; the same words are one message."""
    turns = [USER, OTHER, USER, ANSWER]
    turns.insert(at * 2, SYSTEM)
    row = {"messages": turns, "system": "Be long."}

    with pytest.raises(BadRow) as error:
        to_example(row, detect(row, NONE))

    assert ["DATA-226"] == [fault.code for fault in error.value.faults]
    row["system"] = "Be short."
    assert turns == to_example(row, detect(row, NONE)).messages


def test_a_rated_answer_that_is_masked_rates_no_other() -> None:
    """The row has no token to learn, and is counted as such."""
    row = {"messages": [USER, OTHER, USER, ANSWER | {"weight": 0}], "label": True}

    example = to_example(row, detect(row, Columns(objective="kto")))

    assert Rated(Conversation([USER, OTHER, USER, ANSWER], ()), True) == example


@pytest.mark.parametrize(
    "call",
    [
        CALLED,
        CALLED | {"arguments": '{"a": 2}'},
        {"type": "function"} | CALLED,
        {"type": "function", "function": CALLED},
        {"type": "function", "function": json.dumps(CALLED)},
        {"function": CALLED | {"arguments": '{"a": 2}'}},
    ],
)
def test_every_way_to_write_a_call_is_one_call(call: Row) -> None:
    """With or without the object `function`, arguments as an object or its JSON."""
    turns = [USER, {"role": "assistant", "tool_calls": [call]}]
    row = {"messages": turns}

    (read,) = to_example(row, detect(row, NONE)).messages[1]["tool_calls"]

    assert CALLED == read["function"]


@pytest.mark.parametrize(
    "call",
    [
        "call add(2)",
        {"function": "add(2)"},
        {"name": None, "arguments": {}},
        {"function": {"name": " ", "arguments": {}}},
        {"name": "add", "parameters": {"a": 2}},
        CALLED | {"arguments": [2]},
        CALLED | {"arguments": "a = 2"},
        CALLED | {"arguments": '{"a": NaN}'},
        CALLED | {"arguments": '{"a": 1e400}'},
        CALLED | {"arguments": '{"a": 1, "a": 2}'},
    ],
)
@pytest.mark.parametrize("content", [None, "4"])
def test_a_call_that_is_none_is_refused(call: Any, content: Any) -> None:
    """Once, and not printed as it happens to be."""
    turns = [USER, {"role": "assistant", "content": content, "tool_calls": [call]}]
    row = {"messages": turns}

    with pytest.raises(BadRow) as error:
        to_example(row, detect(row, NONE))

    assert ["DATA-216"] == [fault.code for fault in error.value.faults]


def test_only_the_assistant_calls() -> None:
    """A template would leave a user's call out, or show it as an answer."""
    row = {"messages": [USER | {"tool_calls": [CALLED]}, ANSWER]}

    with pytest.raises(BadRow, match="its role is user"):
        to_example(row, detect(row, NONE))


def test_a_number_that_json_cannot_hold_is_refused_in_a_row(tmp_path: Path) -> None:
    """It would be Infinity."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": 1e400}\n')

    with pytest.raises(DataError, match="DATA-206"):
        check_file(path, "a.jsonl", columns=NONE, extension=None)


def test_nulls_in_a_table_s_arguments_are_told(base: Path, tmp_path: Path) -> None:
    """A struct cannot tell a null argument from none."""
    turns = [USER, {"role": "assistant", "content": "4", "tool_calls": [{"function": CALLED}]}]
    more = {"function": {"name": "add", "arguments": {"b": 1}}}
    rows = [{"messages": turns}, {"messages": [USER, turns[1] | {"tool_calls": [more]}]}]
    notes = []
    qwen = chats.save("qwen2_5", tmp_path / "qwen")
    for kind in ("parquet", "jsonl"):
        path = tmp_path / f"a.{kind}"
        write(path, rows, kind)
        request = {"step": "tokenise", "files": [{"path": str(path), "shown": path.name}]}
        result = work(request | {"base": str(qwen), "out": str(tmp_path / kind), "settings": {}})
        notes.append([n for n in result["notes"] if n.startswith("arguments of tool calls")])

    assert [1, 0] == [len(each) for each in notes]


@pytest.mark.parametrize("key", ["completion_mask", "assistant_masks", "loss_mask"])
def test_masks_of_tokens_hide_what_they_mark(key: str) -> None:
    """As trl reads them: 1 is trained, with labels only where both say so."""
    row = {"input_ids": [5, 6, 7, 8], key: [0, 1, 1, 0]}
    labels = {"labels": [-100, -100, 7, 8]}

    assert (1, 3) == to_example(row, detect(row, NONE)).trained
    assert (2, 3) == to_example(row | labels, detect(row, NONE)).trained
    with pytest.raises(BadRow, match=key):
        to_example(row | {key: [0, 1]}, detect(row, NONE))


@pytest.mark.parametrize("key", ["loss", "loss_weight"])
def test_the_other_mask_keys_of_a_turn(key: str) -> None:
    """ms-swift's `loss: false` is a mask like `weight: 0`."""
    row = {"messages": [USER, OTHER | {key: False}, USER, ANSWER | {key: True}]}

    assert Conversation([USER, OTHER, USER, ANSWER], (3,)) == to_example(row, detect(row, NONE))


@pytest.mark.parametrize("key", ["mask", "masked", "loss_mask"])
def test_a_mask_key_that_may_mean_either_is_refused(key: str) -> None:
    """Some mean that the turn is trained, some that it is hidden."""
    row = {"messages": [USER, ANSWER | {key: 1}]}

    with pytest.raises(BadRow, match=f"{key} does not say"):
        to_example(row, detect(row, NONE))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2 + 2 =", "completion": "4"}, "2 + 2 ="),
        ({"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}, "2 + 2 ="),
        ({"question": "2?", "answer": "4"}, "### Instruction:\n2?\n\n### Response:\n"),
    ],
)
def test_a_system_column_is_never_lost(row: Row, prompt: str) -> None:
    """Of a prompt for a model without a chat template it is the beginning."""
    row = row | {"system": "Be short."}

    example = to_example(row, detect(row, NONE))
    pair = getattr(example, "chosen", example)

    assert ("Be short.", f"Be short.\n\n{prompt}") == (pair.system, pair.bare)


def test_a_system_column_beside_a_rendered_prompt_is_refused(
    outcome: Callable[..., Outcome],
) -> None:
    """No template is applied that would show it."""
    row = {"prompt": ASKED, "completion": "one"}

    assert outcome([row])
    assert outcome([row | {"system": "Be short."}]) is None


def test_the_mix_is_found_in_parts_of_a_file_as_well(base: Path, tmp_path: Path) -> None:
    """Parts that are read side by side decide alike, or the file is refused."""
    turns: Row = {"prompt": [USER], "completion": [ANSWER]}
    rows: list[Row] = [turns] * 1500
    rows += [{"prompt": ASKED, "completion": "one"}] * 600
    rows += [turns] * 600
    rows += [{"prompt": "Two?", "completion": "two"}] * 600
    path = tmp_path / "a.jsonl"
    write(path, rows, "jsonl")
    request = {"step": "tokenise", "files": [{"path": str(path), "shown": "a.jsonl"}]}
    request |= {"base": str(base), "out": str(tmp_path / "out"), "settings": {}}

    for parts in ({"processes": 1}, {"processes": 2, "part_bytes": 100_000}):
        with pytest.raises(DataError, match="DATA-214"):
            work(request | parts)
