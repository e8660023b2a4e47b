"""Rows that compare or rate answers: what of them is trained, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tuning.data.__main__ import work
from tuning.data.first_rows import check_file, check_head
from tuning.data.formats import (
    BadRow,
    Columns,
    Conversation,
    Pair,
    Preference,
    Rated,
    detect,
    to_example,
    unused,
)
from tuning.data.over_length import pair_pieces
from tuning.errors import DataError

USER = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("4", "5"))
SYSTEM = {"role": "system", "content": "Be short."}
NONE = Columns()
CHAT = Preference(Conversation([USER, GOOD], (1,)), Conversation([USER, BAD], (1,)))
HUMAN = "\n\nHuman: 2 + 2?\n\nAssistant:"

READ: dict[str, tuple[dict[str, Any], Columns, Any]] = {
    "trl, implicit prompt": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, NONE, CHAT),
    "trl, explicit prompt": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, NONE, CHAT),
    "ultrafeedback": (
        {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER]},
        NONE,
        CHAT,
    ),
    "one message a side": (
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        NONE,
        CHAT,
    ),
    "from/value turns": (
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        NONE,
        CHAT,
    ),
    "texts to a conversation": (
        {"messages": [USER], "chosen": "4", "rejected": "5"},
        NONE,
        CHAT,
    ),
    "a system message of its own": (
        {"system": "Be short.", "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        NONE,
        Preference(
            *(Conversation([SYSTEM, USER, answer], (2,)) for answer in (GOOD, BAD)),
        ),
    ),
    "several turns": (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
        NONE,
        Preference(
            *(Conversation([USER, GOOD, USER, answer], (3,)) for answer in (GOOD, BAD)),
        ),
    ),
    "texts": (
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        NONE,
        Preference(*(Pair("2 + 2 =", text, "2 + 2 =", raw=True) for text in (" 4", " 5"))),
    ),
    "texts without a prompt": (
        {"chosen": "2 + 2 = four", "rejected": "2 + 2 = five"},
        NONE,
        Preference(*(Pair("2 + 2 =", text, "2 + 2 =", raw=True) for text in (" four", " five"))),
    ),
    "dialogues as text": ({"chosen": f"{HUMAN} 4", "rejected": f"{HUMAN} 5"}, NONE, CHAT),
    "a named prompt": (
        {"task": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
        Columns(context="task", objective="dpo"),
        CHAT,
    ),
    "rated texts": (
        {"prompt": "2 + 2 =", "completion": " 4", "label": True},
        NONE,
        Rated(Pair("2 + 2 =", " 4", "2 + 2 =", raw=True), True),
    ),
    "rated messages": (
        {"prompt": [USER], "completion": [BAD], "label": False},
        NONE,
        Rated(Conversation([USER, BAD], (1,)), False),
    ),
    "a rated conversation": (
        {"messages": [USER, GOOD, USER, BAD], "label": 0},
        Columns(objective="kto"),
        Rated(Conversation([USER, GOOD, USER, BAD], (3,)), False),
    ),
    "a rating as text": (
        {"prompt": [USER], "completion": [GOOD], "label": "true"},
        NONE,
        Rated(Conversation([USER, GOOD], (1,)), True),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_the_shape_of_a_row_decides(case: str) -> None:
    """The ways in which published sets write pairs and ratings; the answers alone are trained."""
    row, options, expected = READ[case]

    assert expected == to_example(row, detect(row, options))


def test_rest_columns_of_published_sets_are_named_as_unread() -> None:
    """Scores and sources are not read, and nothing of a pair is called unread."""
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "score_chosen": 9, "system": "a"}

    assert ["score_chosen"] == unused(row, detect(row, NONE))


@pytest.mark.parametrize(
    ("row", "options", "code", "says"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, NONE, "DATA-259", "the same"),
        ({"prompt": "a", "chosen": "b ", "rejected": " b"}, NONE, "DATA-259", "the same"),
        ({"chosen": "a b", "rejected": "a b"}, NONE, "DATA-259", "the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, NONE, "DATA-227", "chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, NONE, "DATA-220", "rejected is null"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, NONE, "DATA-227", "rejected is"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": " "}]},
            NONE,
            "DATA-225",
            "rejected[0].content of the assistant is empty",
        ),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER]}, NONE, "DATA-223", "rejected has no"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER | {"content": "3 + 3?"}, GOOD]},
            NONE,
            "DATA-260",
            "message 0 differs",
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD]},
            NONE,
            "DATA-260",
            "the beginning of the other",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, NONE, "DATA-221", "a text and a list"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, NONE, "DATA-221", "a number and a number"),
        ({"prompt": "a", "completion": "b", "label": 7}, NONE, "DATA-261", "label is 7"),
        (
            {"messages": [USER, GOOD], "label": "maybe"},
            Columns(objective="kto"),
            "DATA-261",
            'label is "maybe"',
        ),
        (
            {"messages": [USER, GOOD]},
            Columns(objective="dpo"),
            "DATA-263",
            'columns are "messages"',
        ),
        ({"messages": [USER, GOOD]}, Columns(objective="kto"), "DATA-263", "needs"),
        (
            {"prompt": "a", "completion": "b", "label": True},
            Columns(objective="dpo"),
            "DATA-263",
            '"chosen" and "rejected"',
        ),
        ({"Chosen": "a", "rejected": "b"}, NONE, "DATA-213", '"Chosen"'),
        ({"chosen": "a", "rejected": "b"}, Columns(context="q", objective="dpo"), "DATA-250", "q"),
    ],
)
def test_a_row_that_cannot_be_compared_says_why(
    row: dict[str, Any], options: Columns, code: str, says: str
) -> None:
    """Same answers, empty sides, other prompts, other kinds: the first rows tell."""
    with pytest.raises(BadRow) as bad:
        to_example(row, detect(row, options))

    assert code == bad.value.faults[0].code
    assert says in bad.value.faults[0].what


def anything(leaves: Any) -> Any:
    """Values of JSON, among them turns and lists of turns."""
    keys = st.sampled_from(["role", "content", "from", "value"])
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=2),
        max_leaves=6,
    )


@given(
    anything(st.none() | st.booleans() | st.integers() | st.text(max_size=4)),
    anything(st.none() | st.text(max_size=4)),
    st.sampled_from(["prompt", "messages", "question", "extra"]),
    st.text(max_size=3),
)
def test_whatever_a_pair_holds_it_is_read_or_refused(
    chosen: Any, rejected: Any, column: str, prompt: str
) -> None:
    """No value in the columns of a pair ends in anything but an example or faults."""
    row = {"chosen": chosen, "rejected": rejected, column: prompt}
    try:
        example = to_example(row, detect(row, NONE))
    except BadRow as bad:
        assert bad.faults
    else:
        assert isinstance(example, Preference)
        assert example.chosen != example.rejected


# Files.


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ChatML tokenizer."""
    return chats.save("chatml", tmp_path_factory.mktemp("chatml"))


@pytest.fixture
def prepare(base: Path, tmp_path: Path) -> Callable[..., Any]:
    """Tokenise and pack a file; returns both results."""

    def made(content: bytes, name: str = "rows.jsonl", **options: Any) -> Any:
        settings = {"objective": options.pop("objective", None)}
        (tmp_path / name).write_bytes(content)
        file = {"path": str(tmp_path / name), "shown": name, "sha256": "", "size": len(content)}
        out = {"base": str(base), "out": str(tmp_path / "out"), "settings": settings}
        tokenised = work({"step": "tokenise", "files": [file], **out})
        packing = {"max_length": 64, "packing": False, "shuffle": False, "seed": 1}
        packing |= {"train_share": 1.0} | options
        places = {"tokenised": str(tmp_path / "out"), "out": str(tmp_path / "packed")}
        return tokenised, work({"step": "pack", **places, **packing})

    return made


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pair(number: int, *, long: int = 1) -> dict[str, Any]:
    words = " ".join(["more"] * long)
    return {
        "prompt": [{"role": "user", "content": f"{words} {number} ?"}],
        "chosen": [{"role": "assistant", "content": f"yes {number}"}],
        "rejected": [{"role": "assistant", "content": f"no no {number}"}],
    }


def spoken(tokenizer: Any, row: Any) -> list[tuple[str, str]]:
    """Prompt and labelled text of each document of a row."""
    found, start = [], 0
    for length in row["seq_lengths"]:
        ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
        first = next(n for n, label in enumerate(labels) if label != -100)
        found.append(
            (tokenizer.decode(ids[:first]), tokenizer.decode([i for i in labels if i != -100]))
        )
        start += length
    return found


def test_a_training_row_is_the_two_answers_to_one_prompt(prepare: Any, base: Path) -> None:
    """Chosen first; the same prompt before both; answers with their end are labelled."""
    import transformers

    tokenised, packed = prepare(lines(pair(1), pair(2), pair(3)))
    rows = list(Dataset.from_file(packed["train"]["path"]))

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    (prompt, chosen), (same, rejected) = spoken(tokenizer, rows[0])
    assert prompt == same
    assert ("yes 1<|im_end|>", "no no 1<|im_end|>") == (chosen, rejected)
    assert ("dpo", 3, 6) == tuple(tokenised[k] for k in ("objective", "rows", "documents"))
    assert (3, 3) == (packed["train"]["rows"], packed["train"]["documents"])
    assert {2} == {len(row["seq_lengths"]) for row in rows}


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_every_file_type_gives_the_same_pairs(kind: str, prepare: Any) -> None:
    """Turns are JSON text in a CSV file, structs in parquet."""
    rows = [pair(n) for n in range(3)]
    text, sink = io.StringIO(), io.BytesIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows({k: json.dumps(v) for k, v in row.items()} for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), sink)
    written = {
        "json": json.dumps(rows).encode(),
        "csv": text.getvalue().encode(),
        "parquet": sink.getvalue(),
    }
    expected = list(Dataset.from_file(prepare(lines(*rows))[1]["train"]["path"]))

    _, packed = prepare(written[kind], f"rows.{kind}")

    assert expected == list(Dataset.from_file(packed["train"]["path"]))


def test_rated_rows_keep_their_ratings_whatever_the_order(prepare: Any) -> None:
    """The column `good` follows each row through shuffle and split."""
    rows = [
        {
            "prompt": f"{n} ?",
            "completion": f"{'yes' if n % 3 else 'no no no'} {n}",
            "label": n % 3 > 0,
        }
        for n in range(12)
    ]
    tokenised, packed = prepare(lines(*rows), shuffle=True, train_share=0.75)

    assert "kto" == tokenised["objective"]
    for part, number in (("train", 9), ("eval", 3)):
        made = list(Dataset.from_file(packed[part]["path"]))
        assert number == len(made)
        lengths = {
            good: {len(r["input_ids"]) for r in made if r["good"] == good} for good in (0, 1)
        }
        assert not lengths[0] & lengths[1]


@pytest.mark.parametrize(
    ("objective", "rows", "documents", "dropped"),
    [(None, 3, 6, 0), ("kto", 6, 6, 0), ("sft", 3, 3, 0)],
)
def test_the_objective_of_the_config_wins(
    objective: str, rows: int, documents: int, dropped: int, prepare: Any
) -> None:
    """Pairs are two rated answers for kto, and for sft the chosen ones alone."""
    tokenised, packed = prepare(lines(pair(1), pair(2), pair(3)), objective=objective)

    assert (rows, documents) == (tokenised["rows"], tokenised["documents"])
    made = list(Dataset.from_file(packed["train"]["path"]))
    assert rows == len(made)
    if objective == "kto":
        assert [True, False] * 3 == [row["good"] for row in made]


def test_bad_answers_are_left_out_of_sft_and_counted(prepare: Any) -> None:
    """Only what is rated good is learnt as it is."""
    rows = [{"prompt": f"{n} ?", "completion": "yes", "label": n > 1} for n in range(5)]
    tokenised, _ = prepare(lines(*rows), objective="sft")

    assert 3 == tokenised["rows"]
    assert {"rated bad, and objective is sft": 2} == tokenised["dropped"]


def test_answers_that_the_template_makes_the_same_are_refused(prepare: Any) -> None:
    """All such rows in one pass, each with its place, as for every other fault."""
    same = pair(1) | {"rejected": pair(1)["chosen"]}
    with pytest.raises(DataError) as error:
        prepare(lines(pair(0), same, pair(2), same, {"messages": [USER, GOOD]}))

    found = [(problem.code, problem.where) for problem in error.value.problems]
    assert [("DATA-259", "rows.jsonl line 2"), ("DATA-259", "rows.jsonl line 4")] == found[:2]
    assert [("DATA-214", "rows.jsonl line 5")] == found[2:]


@pytest.mark.parametrize("whole", [True, False])
def test_check_reads_the_first_rows_of_pairs(whole: bool, tmp_path: Path) -> None:
    """Before any download: the shape is named, and a pair without a second answer refused."""
    head = lines(pair(1), pair(2))
    told = str(check_head(head, "rows.jsonl", whole=whole, columns=NONE))
    assert 'preference: it has the columns "chosen" and "rejected" to "prompt"' in told

    (tmp_path / "a.jsonl").write_bytes(lines(pair(1), pair(2) | {"rejected": []}))
    with pytest.raises(DataError, match=r"DATA-227 a\.jsonl line 2"):
        check_file(tmp_path / "a.jsonl", "a.jsonl", columns=NONE, extension=None)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 60),
    st.integers(4, 30),
    st.integers(0, 1),
)
def test_a_pair_that_is_too_long_keeps_one_prompt(
    chosen: int, rejected: int, prompt: int, most: int, lead: int
) -> None:
    """Both are cut to max_length, from the same token of the prompt on."""
    lead = min(lead, prompt)
    lengths = [prompt + chosen, prompt + rejected]
    ranges = [[prompt, length] for length in lengths]
    if max(lengths) <= most:
        return

    made = pair_pieces(6, ranges, lengths, most, lead)

    assert [6, 7] == [piece.row for piece in made]
    assert 1 == len({(piece.start, piece.lead) for piece in made})
    assert max(piece.end - piece.start + piece.lead for piece in made) <= most
    if max(chosen, rejected) + lead + min(prompt, most // 4) <= most:
        assert lengths == [piece.end for piece in made]  # no answer is cut


@pytest.mark.parametrize(
    ("policy", "rows", "says"),
    [("auto", 3, "1 rows longer than 40 tokens cut"), ("drop", 2, "1 rows longer than 40 tokens")],
)
def test_long_pairs_are_cut_or_left_out_as_pairs(
    policy: str, rows: int, says: str, prepare: Any
) -> None:
    """Never one answer without the other."""
    content = lines(pair(1), pair(2, long=40), pair(3))
    _, packed = prepare(content, max_length=40, over_length=policy)

    made = list(Dataset.from_file(packed["train"]["path"]))
    assert rows == len(made) == packed["train"]["rows"]
    assert all(max(row["seq_lengths"]) <= 40 for row in made)
    assert {2} == {len(row["seq_lengths"]) for row in made}
    assert says in " ".join(packed["notes"])


def test_answers_that_differ_only_in_what_is_cut_off_are_left_out(prepare: Any) -> None:
    """Two sequences that are the same cannot be told apart, and are counted as left out."""
    start = " ".join(["more"] * 60)
    late = {"prompt": "a ?", "chosen": f"{start} yes", "rejected": f"{start} no"}
    content = lines({"prompt": "b ?", "chosen": "yes", "rejected": "no"}, late)
    _, packed = prepare(content, max_length=40, over_length="truncate")

    assert 1 == packed["train"]["rows"]
    assert {"no token to learn after cutting": 1} == packed["dropped"]


def test_copies_of_a_pair_are_on_one_side_of_the_split(prepare: Any) -> None:
    """Held-out accuracy is not that of pairs that were trained on."""
    content = lines(*[pair(n) for n in range(6)] * 2)
    _, packed = prepare(content, train_share=0.5, shuffle=True)

    parts = [list(Dataset.from_file(packed[part]["path"])) for part in ("train", "eval")]
    seen = [{tuple(np.ravel(row["input_ids"])) for row in part} for part in parts]
    assert not seen[0] & seen[1]
    assert 12 == sum(map(len, parts))


def test_parts_of_a_mixture_have_one_objective(base: Path, tmp_path: Path) -> None:
    """Pairs of two shapes are mixed; pairs beside conversations are refused, with both places."""
    texts = [{"question": f"{n} ?", "chosen": "yes", "rejected": "no"} for n in range(4)]
    written = {
        "a": lines(pair(1), pair(2)),
        "b": lines(*texts),
        "c": lines({"messages": [USER, GOOD]}),
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)

    def tokenised(*names: str) -> Any:
        files = [
            {"path": str(tmp_path / n), "shown": f"{n}.jsonl", "sha256": "", "size": 9, "part": at}
            for at, n in enumerate(names)
        ]
        sources = [{"path": f"{name}.jsonl"} for name in names]
        out = {"base": str(base), "out": str(tmp_path / "out"), "settings": {}, "seed": 1}
        return work({"step": "tokenise", "files": files, "sources": sources, **out})

    assert ("dpo", 6, 12) == tuple(
        tokenised("a", "b")[k] for k in ("objective", "rows", "documents")
    )
    with pytest.raises(DataError, match=r"DATA-215 c\.jsonl line 1: is of shape messages") as error:
        tokenised("a", "c")
    assert "a.jsonl line 1 is of shape preference" in str(error.value)
