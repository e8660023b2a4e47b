"""Files -> tokenised rows -> packed dataset: what is refused and how, what is read and kept."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import random
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset

from tuning import process
from tuning.data import bins, pack, read, sniff, tokenise
from tuning.data.__main__ import work
from tuning.data.over_length import pieces
from tuning.data.parts import Part
from tuning.data.problems import Problems
from tuning.data.source import Source
from tuning.errors import DataError, Problem, SpecError

ROW = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
TEXTS = {"text": "Two plus two is four."}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ChatML tokenizer."""
    return chats.save("chatml", tmp_path_factory.mktemp("chatml"))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Tokenise the files {name: bytes} with the settings given; the rows end in tmp_path/out."""

    def tokenise_files(files: dict[str, bytes], **settings: Any) -> dict[str, Any]:
        listed = []
        for number, (name, content) in enumerate(files.items()):
            path = tmp_path / f"{number:04d}"
            path.write_bytes(content)
            listed.append({"path": str(path), "shown": name, "sha256": "", "size": len(content)})
        return work(
            {
                "step": "tokenise",
                "files": listed,
                "base": str(base),
                "out": str(tmp_path / "out"),
                "settings": settings,
            }
        )

    return tokenise_files


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def table(rows: list[dict[str, Any]] | pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]], opened: Any) -> bytes:
    made = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with opened(sink, made.schema) as writer:
        writer.write_table(made)
    return sink.getvalue().to_pybytes()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("../train.jsonl", lines(ROW))
    return sink.getvalue()


def tarred() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../train.jsonl"), io.BytesIO())
    return sink.getvalue()


@dataclass(frozen=True)
class Bad:
    """A bad-input class: the file(s), and what has to be said where."""

    content: bytes | dict[str, bytes]
    code: str
    where: str
    says: str
    name: str = "train.jsonl"
    more: int = 0  # problems beside the first


Q, A = ("user", "2 + 2?"), ("assistant", "4")
GOOD = lines(ROW)
BAD = {
    "C1 empty": Bad(b"", "DATA-201", "train.jsonl", "is empty"),
    "C1 empty gzip": Bad(gzip.compress(b""), "DATA-201", "train.jsonl", "is empty"),
    "C2 blank lines only": Bad(b"\n \r\n\n", "DATA-201", "train.jsonl", "holds no rows"),
    "C2 empty array": Bad(b"[]", "DATA-201", "train.jsonl", "holds no rows"),
    "C3 bad JSON": Bad(
        GOOD + b'{"messages": oh}\n' + GOOD,
        "DATA-202",
        f"train.jsonl line 2 (byte {len(GOOD)})",
        "is not JSON: Expecting value at character 14",
    ),
    "C3 in an array": Bad(
        b"[" + GOOD + b', {"messages": oh}]', "DATA-202", "train.jsonl row 2", "is not JSON"
    ),
    "C4 last line cut": Bad(GOOD + GOOD[:30], "DATA-203", "line 2", "cut in the middle"),
    "C4 array cut": Bad(b"[" + GOOD + b"," + GOOD[:9], "DATA-203", "row 2", "cut in the middle"),
    "C4 gzip cut": Bad(gzip.compress(GOOD * 99)[:-20], "DATA-203", "train.jsonl", "too early"),
    "C4 zstd cut": Bad(
        zstandard.compress(lines(*({"text": f"a {n}"} for n in range(20000))))[:-20],
        "DATA-203",
        "train.jsonl",
        "too early",
    ),
    "C5 UTF-16": Bad(GOOD.decode().encode("utf-16"), "DATA-204", "train.jsonl", "UTF-16"),
    "C5 without a mark": Bad(GOOD.decode().encode("utf-16-le"), "DATA-204", "train", "UTF-16"),
    "C6 bad UTF-8 byte": Bad(
        GOOD + GOOD.replace(b"2 + 2", b"\xff"), "DATA-205", "line 2", "(0xff) is not UTF-8"
    ),
    "C6 in csv": Bad(b"text\nab,\xff\n", "DATA-205", "line 2", "(0xff) is not UTF-8", "a.csv"),
    "C8 NaN": Bad(GOOD + b'{"text": NaN}\n', "DATA-206", "line 2", "NaN is not a JSON value"),
    "C9 duplicate keys": Bad(
        b'{"text": "a", "text": "b"}\n', "DATA-208", "line 1", 'the key "text" appears twice'
    ),
    "C10 top level not an object": Bad(
        b'["a"]\n5\n"b"\n', "DATA-209", "line 1", "is a list, not an object", more=2
    ),
    "C11 too deep": Bad(
        b'{"text": ' + b"[" * 101 + b"]" * 101 + b"}\n", "DATA-210", "line 1", "100 levels"
    ),
    "C11 far too deep": Bad(
        b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "DATA-210", "line 1", "100 levels"
    ),
    "C12 line too long": Bad(
        GOOD + b'{"text": "' + b"a" * (10 << 20) + b'"}\n', "DATA-211", "line 2", "10 MiB"
    ),
    "C13 no known column": Bad(
        lines({"body": "a"}), "DATA-212", "line 1", '("body") fit no known shape'
    ),
    "C13 one row lacks it": Bad(
        GOOD + lines({"body": "a"}), "DATA-250", "line 2", 'this row has no "messages"'
    ),
    "C14 other case": Bad(
        lines({"Messages": ROW["messages"]}), "DATA-213", "line 1", '"Messages" is not written'
    ),
    "C15 mixed in a file": Bad(
        GOOD + lines({"text": "a"}),
        "DATA-214",
        "train.jsonl line 2",
        "of shape text (it has a column \"text\" and none of the others), but the data began as "
        "messages (train.jsonl line 1)",
    ),
    "C15 two kinds of turns": Bad(
        GOOD + lines({"messages": [{"from": "human", "value": "a"}]}),
        "DATA-214",
        "line 2",
        "messages[0] is a from/value turn",
    ),
    "C16 mixed across files": Bad(
        {"a.jsonl": GOOD, "b.jsonl": lines(TEXTS) * 3},
        "DATA-215",
        "b.jsonl line 1",
        "a.jsonl line 1 is of shape messages",
    ),
    "C17 messages not a list": Bad(
        lines({"messages": "hello"}), "DATA-216", "line 1", "messages is a text, not a list"
    ),
    "C18 empty list": Bad(GOOD + lines(turns()), "DATA-217", "line 2", "messages is empty"),
    "C19 role missing": Bad(
        lines({"messages": [{"content": "a"}]}), "DATA-218", "line 1", "messages[0] has no role"
    ),
    "C20 role unknown": Bad(
        lines(turns(Q, ("bot", "4"))), "DATA-207", "line 1", 'messages[1].role is "bot"; allowed:'
    ),
    "C21 content missing": Bad(
        lines({"messages": [{"role": "user"}]}), "DATA-219", "line 1", "messages[0] has no content"
    ),
    "C22 content null": Bad(
        lines(turns(Q, ("assistant", None))), "DATA-220", "line 1", "messages[1].content is null"
    ),
    "C23 content a number": Bad(
        lines(turns(Q, ("assistant", 4))), "DATA-221", "line 1", "content is a number: 4"
    ),
    "C24 a part that is no text": Bad(
        lines(turns(("user", [{"type": "image_url", "image_url": "x"}]), A)),
        "DATA-222",
        "line 1",
        'messages[0].content[0] is a part of type "image_url"',
    ),
    "C25 no assistant turn": Bad(lines(turns(Q)), "DATA-223", "line 1", "no assistant turn"),
    "C26 last turn not assistant": Bad(
        lines(turns(Q, A, Q)), "DATA-224", "line 1", "messages[2], the last message, is"
    ),
    "C27 empty assistant text": Bad(
        lines(turns(Q, ("assistant", " "))), "DATA-225", "line 1", "of the assistant is empty"
    ),
    "C28 two systems": Bad(
        lines(turns(("system", "a"), ("system", "b"), Q, A)),
        "DATA-226",
        "line 1",
        "messages[1] is a second system message",
    ),
    "C29 empty completion": Bad(
        lines({"prompt": "a", "completion": ""}), "DATA-227", "line 1", "completion is empty"
    ),
    "C32 all labels masked": Bad(
        lines({"input_ids": [1, 2], "labels": [-100, -100]}),
        "DATA-230",
        "data",
        "none of the 1 rows has a token to learn",
    ),
    "C34 special token in a text": Bad(
        lines(turns(("user", "say <|im_end|>"), A)), "DATA-233", "line 1", '"<|im_end|>"'
    ),
    "C35 NUL": Bad(lines(turns(("user", "a\0"), A)), "DATA-234", "line 1", "a NUL character"),
    "C35 lone surrogate": Bad(
        rb'{"text": "a\ud800"}' + b"\n", "DATA-234", "line 1", "a lone surrogate) at 1"
    ),
    "C38 parquet without footer": Bad(
        table([ROW])[:-8], "DATA-237", "train.parquet", "probably cut", "train.parquet"
    ),
    "C38 arrow cut": Bad(
        arrow([ROW] * 9, pa.ipc.new_file)[:-20], "DATA-237", "a.arrow", "probably cut", "a.arrow"
    ),
    "C39 csv as parquet": Bad(
        b"text\na\n", "DATA-238", "train.parquet", "is not a parquet file", "train.parquet"
    ),
    "C39 parquet as jsonl": Bad(table([ROW]), "DATA-238", "train.jsonl", "is a parquet file"),
    "C40 binary column": Bad(
        table([{"text": b"\1"}]), "DATA-221", "row 1", "text is binary data", "train.parquet"
    ),
    "C41 ragged": Bad(
        b"question,answer\na,b\nc,d,e\n", "DATA-240", "line 3", "has 3 fields", "train.csv"
    ),
    "C41 open quote": Bad(
        b'question,answer\na,"b\n' + b"c,d\n" * 500,
        "DATA-240",
        "train.csv line 2",
        "a quote that is never closed",
        "train.csv",
    ),
    "C12 a csv line without end": Bad(
        b"question,answer\na,b\n" + b"x" * (6 << 20) + b"," + b"y" * (6 << 20) + b"\n",
        "DATA-211",
        "train.csv line 3",
        "is longer than 10 MiB",
        "train.csv",
    ),
    "two splits in one object": Bad(
        b'{"train": [' + GOOD.strip() + b'],\n "validation": [' + GOOD.strip() + b"]}",
        "DATA-249",
        "train.json row 2",
        'rows under two keys, "train" and "validation"',
        "train.json",
    ),
    "rows under a key of no known name": Bad(
        b'{"data": [' + GOOD.strip() + b'],\n "part2": [' + GOOD.strip() + b"]}",
        "DATA-249",
        "train.json row 2",
        'rows under two keys, "data" and "part2"',
        "train.json",
    ),
    "a negative token": Bad(
        lines({"input_ids": [-1, 5]}), "DATA-247", "line 1", "input_ids holds -1"
    ),
    "C41 other separator": Bad(
        b"question;answer\na;b\n", "DATA-252", "train.csv", "separated by ';'", "train.csv"
    ),
    "C42 zip": Bad(zipped(), "DATA-241", "train.jsonl", "is a zip archive"),
    "C42 tar": Bad(tarred(), "DATA-241", "train.jsonl", "is a tar archive"),
    "C42 tar in gzip": Bad(gzip.compress(tarred()), "DATA-241", "train", "is a tar archive"),
    "C42 nested": Bad(
        gzip.compress(gzip.compress(GOOD)), "DATA-241", "train.jsonl", "compressed twice"
    ),
    "C42 bomb": Bad(
        gzip.compress(b" " * (70 << 20)),
        "DATA-253",
        "train.jsonl",
        "200 times its size",
    ),
    "C42 damaged": Bad(
        gzip.compress(GOOD)[:10] + b"\xff" * 20, "DATA-243", "train.jsonl", "damaged gzip"
    ),
    "F26 login page": Bad(
        b"\n<!DOCTYPE html><html>log in", "DATA-242", "train.jsonl", 'begins with "<!DOCTYPE html>'
    ),
    "Git LFS pointer": Bad(
        b"version https://git-lfs.github.com/spec/v1\noid", "DATA-248", "train", "Git LFS"
    ),
    "PDF": Bad(b"%PDF-1.7", "DATA-241", "train.jsonl", "is a PDF document"),
    "words": Bad(b"once upon a time", "DATA-241", "book.txt", "in an unknown format", "book.txt"),
}  # fmt: skip


def problems(error: pytest.ExceptionInfo[DataError]) -> list[Problem]:
    return list(error.value.problems)


@pytest.mark.parametrize("name", BAD)
def test_bad_content(name: str, run: Callable[..., Any], tmp_path: Path) -> None:
    """Each bad-input class ends in one message with code, place, what is wrong, what to change."""
    bad = BAD[name]
    content = bad.content if isinstance(bad.content, dict) else {bad.name: bad.content}

    with pytest.raises(DataError) as error:
        run(content)

    first, *more = problems(error)
    assert (bad.code, bad.more) == (first.code, len(more))
    assert bad.where in first.where
    assert bad.says in first.what
    assert first.change
    assert 10 == error.value.exit_code
    assert not (tmp_path / "out" / "rows.arrow").exists()
    assert all(len(problem.what) < 300 for problem in error.value.problems)


def test_all_problems_in_one_pass(run: Callable[..., Any]) -> None:
    """Several files, several kinds: all of them are named, 20 of a code in full."""
    files = {
        "a.jsonl": lines(*[turns(Q)] * 25, turns(("bot", "a"), ("user", 5))) + b"{\n",
        "b.jsonl": b"<html>",
    }

    with pytest.raises(DataError) as error:
        run(files)

    counts = Counter(problem.code for problem in error.value.problems)
    assert {"DATA-223": 25, "DATA-207": 1, "DATA-221": 1, "DATA-202": 1, "DATA-242": 1} == counts
    assert "DATA-223: the same in 5 more places." in str(error.value)


def test_as_a_child_process(base: Path, tmp_path: Path) -> None:
    """The parent gets the answer, or the error with its exit code, through a file."""
    request = {
        "step": "tokenise",
        "files": [{"path": str(tmp_path / "a"), "shown": "a.jsonl"}],
        "base": str(base),
        "out": str(tmp_path / "out"),
        "settings": {},
    }
    log = tmp_path / "log"

    (tmp_path / "a").write_bytes(GOOD)
    answer = process.run("data", tmp_path / "one.json", request, log=log)
    (tmp_path / "a").write_bytes(lines(turns(("user", "SECRET " * 50))))
    with pytest.raises(DataError) as error:
        process.run("data", tmp_path / "two.json", request, log=log)

    assert 1 == answer["rows"]
    assert ["DATA-223"] == [problem.code for problem in error.value.problems]
    assert "SECRET" not in log.read_text() + str(error.value)


def test_too_many_problems(run: Callable[..., Any]) -> None:
    """A file of nothing but problems is not collected for ever."""
    with pytest.raises(DataError) as error:
        run({"a.jsonl": lines(turns(Q)) * 10_050})

    assert "DATA-299" == problems(error)[-1].code


def test_values_are_shown_short_and_escaped(run: Callable[..., Any]) -> None:
    """A message never holds a record, nor what could play tricks with a terminal."""
    with pytest.raises(DataError) as error:
        run({"a.jsonl": lines(turns(("\x1b[31m" + "x" * 500, "a"), A))})

    what = problems(error)[0].what
    assert "\x1b" not in what
    assert r"\u001b[31mx" in what
    assert len(what) < 200


EMOJI = json.dumps(turns(("user", "hi 🙂"), A), ensure_ascii=False).encode()
VALID = {
    "CRLF": {"a.jsonl": GOOD.replace(b"\n", b"\r\n") * 2},
    "BOM and emoji": {"a.jsonl": b"\xef\xbb\xbf" + EMOJI + b"\n" + GOOD},
    "no final newline": {"a.jsonl": GOOD + GOOD[:-1]},
    "jsonl.gz": {"a.jsonl.gz": gzip.compress(GOOD * 2)},
    "gzip of two members": {"a.jsonl.gz": gzip.compress(GOOD) + gzip.compress(GOOD)},
    "jsonl.zst": {"a.jsonl.zst": zstandard.compress(GOOD * 2)},
    "gz by name only": {"a.jsonl.gz": GOOD * 2},
    "json array by name": {"a.json": json.dumps([ROW, ROW]).encode()},
    "C7 array in a jsonl": {"a.jsonl": json.dumps([ROW, ROW], indent=1).encode()},
    "object that wraps": {"a.json": json.dumps({"version": 1, "data": [ROW, ROW]}).encode()},
    "pretty object that wraps": {"a.json": json.dumps({"data": [ROW, ROW]}, indent=2).encode()},
    "objects over several lines": {"a.json": json.dumps(ROW, indent=2).encode() * 2},
    "int-like strings": {"a.jsonl": lines({"question": "1", "answer": "2"}) * 2},
    "int-like csv": {"a.csv": b"question,answer\n1,2\n3,4\n"},
    "extra columns": {"a.jsonl": lines(ROW | {"id": 5, "x": [[{"deep": None}]]}) * 2},
    "blank lines between": {"a.jsonl": b"\n" + GOOD + b"\n\n" + GOOD},
    "tsv": {"a.tsv": b"question\tanswer\na\tb\nc\td, e\n"},
    "csv with quotes": {"a": b'question,answer\n"a\nb","c ""d"", e"\nf,g\n'},
    "csv with messages as JSON": {
        "a.csv": b"messages\n" + b'"[{""role"": ""user"", ""content"": ""a, b""}, '
        b'{""role"": ""assistant"", ""content"": ""c""}]"\n' * 2
    },
    "no name at all": {"https://host/download?id=5": GOOD * 2},
    "two files of one name": {"a.jsonl": GOOD, "b/a.jsonl": GOOD},
    "two formats": {"a.jsonl": GOOD, "a.parquet": table([ROW])},
    "parquet": {"a.parquet": table([ROW, ROW])},
    "parquet.gz": {"a.parquet.gz": gzip.compress(table([ROW, ROW]))},
    "arrow file": {"a.arrow": arrow([ROW, ROW], pa.ipc.new_file)},
    "arrow stream": {"a.arrow": arrow([ROW, ROW], pa.ipc.new_stream)},
    "dictionary column": {
        "a.parquet": table(pa.table({"text": pa.array(["a b", "a b"]).dictionary_encode()}))
    },
    "nested extra column": {
        "a.parquet": table([ROW | {"m": {"x": [{"y": b"z"}]}}, ROW | {"m": None}])
    },
    "C24 text parts": {
        "a.jsonl": lines(turns(("user", [{"type": "text", "text": "2 + 2?"}]), A)) * 2
    },
}


@pytest.mark.parametrize("name", VALID)
def test_odd_but_valid(name: str, run: Callable[..., Any]) -> None:
    """What is unusual but means something is read: two rows each."""
    result = run(VALID[name])

    assert 2 == result["rows"]
    assert 0 == sum(result["dropped"].values())


def test_one_row_is_enough(run: Callable[..., Any]) -> None:
    """One row is one batch."""
    assert 1 == run({"a.jsonl": GOOD})["rows"]


def test_dataset_extension_settles_a_wrong_name(run: Callable[..., Any]) -> None:
    """The option says what the name does not."""
    result = run({"a.jsonl": table([ROW])}, dataset_extension="parquet")

    assert ["parquet"] == [file["format"] for file in result["files"]]


def test_result(run: Callable[..., Any], tmp_path: Path) -> None:
    """The answer counts rows per file, tokens, trained tokens and lengths, and shows rows."""
    masked = turns(Q, A)
    masked["messages"][1]["weight"] = 0

    result = run(
        {"a.jsonl": GOOD * 3 + lines(masked), "b.jsonl": lines(turns(Q, ("assistant", "4 4 4")))}
    )

    preview = json.loads((tmp_path / "out" / "preview.json").read_text())
    assert {"a.jsonl": 3, "b.jsonl": 1} == result["rows_per_file"]
    assert {"no token to learn": 1} == result["dropped"]
    assert "messages" == result["shape"]["name"]
    counts = result["lengths"]["counts"]
    assert 4 == sum(rows for _, rows in counts)
    assert result["tokens"] == sum(length * rows for length, rows in counts)
    assert 0 < result["trained_tokens"] < result["tokens"]
    shown = ["a.jsonl line 1", "a.jsonl line 2", "a.jsonl line 3", "b.jsonl line 1"]
    assert shown == [p["where"] for p in preview]
    assert "4<|im_end|>" == "".join(text for text, trained in preview[0]["tokens"] if trained)


def test_same_rows_in_every_format(run: Callable[..., Any], tmp_path: Path) -> None:
    """A dataset gives the same tokens whatever file it comes in."""
    rows = [turns(Q, ("assistant", f"It is {n}.")) for n in range(2500)]
    formats = {
        "a.jsonl": lines(*rows),
        "a.json": json.dumps(rows).encode(),
        "a.parquet": table(rows),
        "a.arrow": arrow(rows, pa.ipc.new_stream),
        "a.jsonl.zst": zstandard.compress(lines(*rows)),
    }
    seen = []
    for name, content in formats.items():
        run({name: content})
        with pa.ipc.open_file(tmp_path / "out" / "rows.arrow") as reader:
            made = reader.read_all().combine_chunks()
        seen.append(made.select(["input_ids", "trained", "place"]))

    assert all(seen[0].equals(other) for other in seen[1:])
    assert 2500 == len(seen[0])


def test_a_template_that_is_none(run: Callable[..., Any]) -> None:
    """A chat template with a syntax error is the spec's fault, found before the data is read."""
    with pytest.raises(SpecError) as error:
        run({"a.jsonl": GOOD}, chat_template="{% for %}")

    assert ["DATA-245"] == [problem.code for problem in error.value.problems]


def test_template_of_the_user(run: Callable[..., Any], tmp_path: Path) -> None:
    """ModelConfig.chat_template replaces the model's own."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )

    run({"a.jsonl": GOOD}, chat_template=template)

    preview = json.loads((tmp_path / "out" / "preview.json").read_text())
    text = "".join(token for token, _ in preview[0]["tokens"])
    assert "user: 2 + 2?<|im_end|>assistant: 4<|im_end|>" == text


def test_no_tokenizer(run: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """A base folder without a tokenizer is named as such."""
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    request = {
        "files": [{"path": str(tmp_path / "a.jsonl"), "shown": "a.jsonl"}],
        "base": str(tmp_path),
        "out": str(tmp_path / "out"),
        "settings": {},
    }

    with pytest.raises(SpecError) as error:
        tokenise.run(request)

    assert ["DATA-246"] == [problem.code for problem in error.value.problems]


# Packing


def packed(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return work(
        {
            "step": "pack",
            "tokenised": str(tmp_path / "out"),
            "out": str(tmp_path / "packed"),
            "max_length": 64,
            "packing": True,
            "shuffle": True,
            "seed": 7,
            "shuffle_seed": None,
            "train_share": 1,
            "batch": None,
        }
        | changes
    )


def many(count: int = 400, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    return lines(
        *(
            turns(Q, ("assistant", " ".join(["four"] * draw.randint(1, 5)) + f" {n}"))
            for n in range(count)
        )
    )


def documents(part: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The documents of a written dataset as (ids, labels)."""
    found = []
    for row in Dataset.from_file(part["path"]):
        ends = list(itertools.accumulate(row["seq_lengths"]))
        assert ends[-1] == len(row["input_ids"]) == len(row["labels"])
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            found.append((tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end])))
    return found


def test_packing_loses_nothing(run: Callable[..., Any], tmp_path: Path) -> None:
    """Packed rows hold the same documents, tokens and labels as unpacked ones."""
    result = run({"a.jsonl": many()})

    tight, loose = packed(tmp_path), packed(tmp_path, packing=False, out=str(tmp_path / "loose"))

    assert sorted(documents(loose["train"])) == sorted(documents(tight["train"]))
    assert result["tokens"] == tight["train"]["tokens"] == loose["train"]["tokens"]
    assert result["trained_tokens"] == tight["train"]["trained_tokens"]
    assert 400 == loose["train"]["rows"] == tight["train"]["documents"]
    patterns = bins.pack([tuple(pair) for pair in result["lengths"]["counts"]], size=64)
    assert tight["train"]["rows"] == sum(number for _, number in patterns)
    assert all(len(row["input_ids"]) <= 64 for row in Dataset.from_file(tight["train"]["path"]))
    assert all(labels[0] == -100 for _, labels in documents(tight["train"]))


def test_packing_is_seeded(run: Callable[..., Any], tmp_path: Path) -> None:
    """The same seed gives the same bytes, another one another order."""
    run({"a.jsonl": many()})

    def bytes_of(**changes: Any) -> bytes:
        return Path(packed(tmp_path, **changes)["train"]["path"]).read_bytes()

    assert bytes_of() == bytes_of()
    assert bytes_of() != bytes_of(seed=8)
    assert bytes_of(packing=False, shuffle=False) == bytes_of(packing=False, shuffle=False, seed=8)


def test_trl_takes_the_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    """trl's own collator makes documents of them, and a pad token masks no end of turn."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    run({"a.jsonl": many(20)})
    part = packed(tmp_path)["train"]
    rows = list(Dataset.from_file(part["path"]))
    pad = chats.tokenizer("chatml").eos_token_id

    flat = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=True)(rows)
    padded = DataCollatorForLanguageModeling(pad_token_id=pad)(rows)

    assert 20 == int((flat["position_ids"] == 0).sum())
    assert part["trained_tokens"] == int((flat["labels"] != -100).sum())
    assert part["trained_tokens"] == int((padded["labels"] != -100).sum())
    assert 20 == int((padded["labels"] == pad).sum())


def test_held_out_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    """train_test_split parts the rows by a seeded draw; both parts together are all of them."""
    run({"a.jsonl": many(100)})
    everything = documents(packed(tmp_path)["train"])

    result = packed(tmp_path, train_share=0.9)

    train, held_out = documents(result["train"]), documents(result["eval"])
    assert (90, 10) == (len(train), len(held_out))
    assert sorted(everything) == sorted(train + held_out)
    assert held_out == documents(packed(tmp_path, train_share=0.9)["eval"])
    other = documents(packed(tmp_path, train_share=0.9, shuffle_seed=1)["eval"])
    assert sorted(held_out) != sorted(other)


def test_identical_rows_are_on_one_side_of_the_split(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Whatever the seed: no held-out row is trained on, nothing is lost, a note counts them."""
    run({"a.jsonl": many(60) + many(30)})  # half of the rows, twice
    for seed in range(5):
        result = packed(tmp_path, train_share=0.8, seed=seed)

        train, held_out = documents(result["train"]), documents(result["eval"])
        assert not {*train} & {*held_out}
        assert 90 == len(train) + len(held_out)
        assert 17 <= len(held_out) <= 18  # of a share of 0.8
        (note,) = result["notes"]
        assert "30 rows are copies of others" in note


def test_few_rows_of_many_copies_are_split_by_what_they_say(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """The rarest row is held out where no group is small enough; one row alone is refused."""
    run({"a.jsonl": many(1) * 15 + many(2)[len(many(1)) :] * 5})
    result = packed(tmp_path, train_share=0.9)
    assert (15, 5) == tuple(len(documents(result[part])) for part in ("train", "eval"))

    run({"a.jsonl": many(1) * 20})
    with pytest.raises(DataError, match="all 20 rows are identical"):
        packed(tmp_path, train_share=0.9)


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"train_share": 0.001}, "DATA-236", "leaves 0 to train on"),  # C37
        ({"train_share": 0.999}, "DATA-236", "and 0 held out"),  # C37
        ({"batch": 99, "packing": False}, "DATA-235", "20 rows, fewer than one batch of 99"),  # C36
        ({"max_length": 4}, "DATA-228", "all 20 rows are longer than max_length 4"),  # C30
        ({"max_length": 4, "over_length": "drop"}, "DATA-228", "all 20 rows are longer"),  # C30
        ({"max_length": 20, "over_length": "refuse"}, "DATA-229", "a.jsonl line "),  # C31
    ],
)
def test_bad_amounts(
    run: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], code: str, says: str
) -> None:
    """Too few rows, or rows that are too long, are refused with the numbers."""
    run({"a.jsonl": many(20)})

    with pytest.raises(DataError) as error:
        packed(tmp_path, **changes)

    (problem,) = problems(error)
    assert (code, True) == (problem.code, says in problem.what)


def test_some_rows_too_long(run: Callable[..., Any], tmp_path: Path) -> None:
    """C31: the answer stays, the prompt is cut from the left, and it is counted."""
    long = turns(("user", "word " * 200), A)
    run({"a.jsonl": GOOD * 3 + lines(long)})

    kept = packed(tmp_path)
    dropped = packed(tmp_path, over_length="drop")

    decode = chats.tokenizer("chatml").decode
    answers = {decode([t for t in labels if t != -100]) for _, labels in documents(kept["train"])}
    assert {"4<|im_end|>"} == answers
    assert (4, 1, 1) == (
        kept["train"]["documents"],
        *map(kept["over_length"].get, ("rows", "truncated")),
    )
    assert (3, 1) == (dropped["train"]["documents"], dropped["over_length"]["dropped"])
    assert ["1 rows longer than 64 tokens cut so that all answers stay"] == kept["notes"]


def test_truncate_truncates_where_every_row_is_too_long(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Whoever asks for it by name means it; what a split leaves out is counted."""
    tokens = run({"a.jsonl": lines(turns(("user", "word " * 200), A)) * 2})["tokens"]
    with pytest.raises(DataError, match="DATA-228"):
        packed(tmp_path)

    cut = packed(tmp_path, over_length="truncate")
    split = packed(tmp_path, over_length="split")

    assert (2, 2) == (cut["train"]["documents"], cut["over_length"]["truncated"])
    over = split["over_length"]
    assert tokens == over["lost_tokens"] + split["train"]["tokens"]
    assert over["lost_tokens"] > 100
    assert f"{over['lost_tokens']:,} tokens without an answer left out" in split["notes"][0]


def test_answers_that_are_lost_are_counted(run: Callable[..., Any], tmp_path: Path) -> None:
    """What is cut for good is said: whole turns at the end, or an answer's end."""
    many_turns = turns(*[("user", "2 + 2?"), ("assistant", "four is the sum " * 2)] * 6)
    run({"a.jsonl": GOOD + lines(many_turns, turns(Q, ("assistant", "word " * 300)))})

    kept = packed(tmp_path)

    over = kept["over_length"]
    assert 2 == over["truncated"] and 1 == over["cut_answers"] and 1 <= over["lost_answers"] < 6
    (note,) = kept["notes"]
    lost = f"{over['lost_answers']} of their answers left out, 1 of their answers cut short"
    assert f"2 rows longer than 64 tokens cut: {lost}" == note


def test_long_text_is_split(run: Callable[..., Any], tmp_path: Path) -> None:
    """Running text loses no token, even if every row is too long."""
    result = run({"a.jsonl": lines({"text": "one two three four " * 100}) * 2})

    split = packed(tmp_path)

    assert result["tokens"] == split["train"]["tokens"]
    assert (2, 0) == (split["over_length"]["split"], split["over_length"]["lost_tokens"])


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ([10, 20, 60, 100], (0, 20, 0)),  # whole turns from the start
        ([70, 100], (51, 100, 1)),  # the prompt is cut from the left, behind BOS
        ([40, 100], (28, 77, 1)),  # the answer itself is too long: it loses its end
        ([5, 100], (0, 50, 0)),
    ],
)
def test_what_is_kept_of_a_long_row(trained: list[int], expected: tuple[int, int, int]) -> None:
    """A row of 100 tokens in 50: answers first."""
    (piece,) = pieces(0, trained, length=100, max_length=50, policy="truncate", lead=1)

    assert expected == (piece.start, piece.end, piece.lead)


@pytest.mark.parametrize("size", [512, 2048, 8192])
def test_packing_efficiency(size: int) -> None:
    """At least 0.99 of the room is used on lengths like those of chats."""
    draw = np.random.RandomState(0)
    lengths = np.clip(draw.lognormal(5.0, 0.8, 20000).astype(int), 8, size)

    members, ends = pack.assign(lengths, size=size, seed=0)

    sums = np.add.reduceat(lengths[members], np.concatenate(([0], ends[:-1])))
    assert sorted(members.tolist()) == list(range(20000))
    assert sums.max() <= size
    assert lengths.sum() / (len(ends) * size) >= 0.99


def test_packing_is_near_the_best() -> None:
    """On random small cases no bin overflows, nothing is lost, and few bins are wasted."""
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randint(1, 30)
        lengths = Counter(draw.randint(1, size) for _ in range(draw.randint(1, 60)))

        patterns = bins.pack(lengths.items(), size=size)

        placed: Counter[int] = Counter()
        for pattern, number in patterns:
            assert 0 < sum(pattern) <= size
            for length in pattern:
                placed[length] += number
        assert lengths == placed
        total = sum(length * rows for length, rows in lengths.items())
        assert sum(number for _, number in patterns) <= 1 + 1.5 * total / size


# -- tables -------------------------------------------------------------------------------------

CALLS = [
    ("add", {"a": 2}, {"a": {"type": "number"}}),
    ("wx", {"city": "Rome"}, {"city": {"type": "string"}}),
]
CALLED = [
    {
        "messages": [
            {"role": "user", "content": "go", "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}}],
            },
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": n, "parameters": {"type": "object", "properties": p}},
            }
        ],
    }
    for n, a, p in CALLS
]


def ids_of(out: Path) -> list[list[int]]:
    with pa.ipc.open_file(str(out / "out" / "rows.arrow")) as reader:
        return list(reader.read_all().column("input_ids").to_pylist())


def test_a_table_of_tool_calls_is_what_its_lines_are(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A struct has the keys of all rows; what it fills with null nobody called or declared."""
    base = chats.save("qwen2_5", tmp_path_factory.mktemp("qwen"))
    found = []
    for name, content in (
        ("a.jsonl", lines(*CALLED)),
        ("a.parquet", table(CALLED)),
        ("a.arrow", arrow(CALLED, pa.ipc.new_file)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "0000").write_bytes(content)
        file = {"path": str(folder / "0000"), "shown": name, "sha256": "", "size": len(content)}
        request = {"step": "tokenise", "files": [file], "base": str(base), "settings": {}}
        work(request | {"out": str(folder / "out")})
        found.append(ids_of(folder))

    assert found[0] == found[1] == found[2]


def test_columns_of_a_table_that_nobody_reads_are_named(run: Callable[..., Any]) -> None:
    """As those of JSONL are, though they are never loaded."""
    result = run({"a.parquet": table([ROW | {"explanation": "because"}])})

    assert ['not read: the columns "explanation" (1 rows)'] == result["notes"]


@pytest.mark.parametrize("made", ["parquet", "arrow", "csv", "json"])
def test_long_rows_come_in_small_batches(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory follows the size of a batch, whatever the number of its rows."""
    rows = [{"text": f"{n} " * 50_000} for n in range(40)]
    content = {
        "parquet": lambda: table(rows),
        "arrow": lambda: arrow(rows, pa.ipc.new_file),
        "csv": lambda: b"text\n" + b"".join(row["text"].encode() + b"\n" for row in rows),
        "json": lambda: json.dumps(rows).encode(),
    }[made]()
    path = tmp_path / f"a.{made}"
    path.write_bytes(content)
    kind = sniff.sniff(path, path.name, None)
    source = Source(path, path.name, kind, Problems(), tmp_path, part=Part(size=len(content)))

    found = list(read.batches(source))

    assert 40 == sum(len(batch.rows) for batch in found)
    assert list(range(40)) == [int(r["text"].split()[0]) for batch in found for r in batch.rows]
    assert max(sum(len(row["text"]) for row in batch.rows) for batch in found) < 2 << 20
    assert sorted(p for batch in found for p in batch.places) == [
        p for batch in found for p in batch.places
    ]


def test_byte_order_marks_of_joined_files_are_passed_over(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """`cat a.jsonl b.jsonl` of files that Windows wrote: at the start, within, alone on a line."""
    mark = codecs.BOM_UTF8
    result = run({"a.jsonl": mark + many(20) + mark + many(20) + mark + b"\n"})

    assert 40 == result["rows"]


def test_turns_that_are_rendered_already_are_noted(run: Callable[..., Any]) -> None:
    """The marks of another format would be trained as text, inside the template's own."""
    turn = turns(("user", "[INST] hi [/INST]"), ("assistant", "four"))
    result = run({"a.jsonl": lines(*[turn] * 20), "b.jsonl": many(20)})

    assert any("another chat format: [/INST] (20 rows)" in n for n in result["notes"])
