"""Mixtures: how many rows of each part, which ones, and what becomes of their shapes."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import chats
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.data.__main__ import work
from tuning.data.file_encoder import FileEncoder, Input
from tuning.data.formats import Columns
from tuning.data.mixture import draw
from tuning.data.problems import Problems
from tuning.data.sniff import FileType
from tuning.errors import DataError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.save("chatml", tmp_path_factory.mktemp("chatml"))


def chat(count: int, name: str = "c") -> bytes:
    """JSONL with a blank line after every fifth row."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": f"{name}{n}"},
            ]
        }
        for n in range(count)
    ]
    return b"".join(
        json.dumps(row).encode() + (b"\n\n" if n % 5 == 4 else b"\n") for n, row in enumerate(rows)
    )


def table(count: int, columns: tuple[str, str]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    writer.writerows([f"q{n}", f"t{n}"] for n in range(count))
    return out.getvalue().encode()


def parquet(count: int) -> bytes:
    sink = io.BytesIO()
    rows = [{"text": f"p{n} and more words"} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    return sink.getvalue()


def mixed(
    base: Path,
    out: Path,
    files: list[tuple[str, bytes, int]],
    sources: list[dict[str, Any]],
    *,
    seed: int = 42,
    **more: Any,
) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """The result of tokenising `files` (name, content, part); the places of each file's rows."""
    out.mkdir(exist_ok=True, parents=True)
    listed = []
    for number, (name, content, part) in enumerate(files):
        path = out / f"{number}-{name}"
        path.write_bytes(content)
        listed.append({"path": str(path), "shown": name, "part": part})
    request = {
        "step": "tokenise",
        "files": listed,
        "base": str(base),
        "out": str(out / "tokenised"),
        "settings": {},
        "sources": [{"path": f"{n}"} | source for n, source in enumerate(sources)],
        "seed": seed,
    }
    result = work(request | more)
    places: dict[int, list[int]] = {}
    path = out / "tokenised" / "rows.arrow"
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        rows = reader.read_all()
    for file, place in zip(*(rows[name].to_pylist() for name in ("file", "place")), strict=True):
        places.setdefault(file, []).append(place)
    return result, places


def rows_of(result: dict[str, Any]) -> list[int]:
    return [source["rows"] for source in result["sources"]]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 40), st.integers(1, 1000)),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 1000),
)
def test_weights_give_the_largest_mixture_in_which_no_row_comes_twice(
    parts: list[tuple[int, int, int]], seed: int
) -> None:
    """Each part's share is its weight's to one row, one part is used up, and every row is its own;
    a part of two files is one part.
    """
    with tempfile.TemporaryDirectory() as name:
        inputs = []
        for number, part in enumerate(parts):
            for count in filter(None, part[:2]):
                path = Path(name, f"{len(inputs)}.jsonl")
                path.write_bytes(chat(count))
                inputs.append(Input(len(inputs), path, path.name, FileType("jsonl"), number))
        # nothing is encoded
        encoder = FileEncoder(cast(Any, None), [Columns()] * len(parts), Problems(), Path(name))
        shares = [{"path": "x", "weight": weight} for *_, weight in parts]
        drawn = draw(inputs, shares, encoder, seed=seed)
        chosen = [(each.part, np.load(str(each.chosen)).tolist()) for each in drawn]
        again = draw(inputs, shares, encoder, seed=seed)
        assert chosen == [(each.part, np.load(str(each.chosen)).tolist()) for each in again]

    whole = min((first + second) / weight for first, second, weight in parts)
    rows = [sum(len(own) for part, own in chosen if part == n) for n in range(len(parts))]
    assert any(got == first + second for got, (first, second, _) in zip(rows, parts, strict=True))
    for got, (first, second, weight) in zip(rows, parts, strict=True):
        assert 1 <= got <= first + second
        assert got == 1 or weight * whole - 1 < got <= weight * whole + 1e-3
    for _, own in chosen:
        assert own == sorted(set(own))
        assert all(line % 6 for line in own)  # which is blank


def test_numbers_of_rows_weights_and_whole_parts_stand_together(base: Path, tmp_path: Path) -> None:
    """Of each so many; each has its own shape and rendering, and columns, if it names them."""
    files = [
        ("a.jsonl", chat(50), 0),
        ("b.csv", table(40, ("Frage", "Antwort")), 1),
        ("c.parquet", parquet(30), 2),
    ]
    columns = {"context_column": "Frage", "response_column": "Antwort"}

    result, places = mixed(
        base, tmp_path, files, [{"rows": 7}, {"weight": 2.5} | columns, {"rows": 30}]
    )

    assert [7, 40, 30] == rows_of(result)
    assert ["messages", "pair", "text"] == [each["shape"]["name"] for each in result["sources"]]
    assert [
        "conversations through the chat template",
        "pairs as a user turn and an assistant turn through the chat template",
        "all tokens as they are",
    ] == [each["rendering"] for each in result["sources"]]
    for name in ("tokens", "trained_tokens"):
        assert result[name] == sum(each[name] for each in result["sources"])
    assert list(range(1, 31)) == places[2]


def test_the_seed_draws_and_nothing_else_does(base: Path, tmp_path: Path) -> None:
    """The same rows for one seed, in one process or in three, others for another."""
    files = [("a.jsonl", chat(900), 0), ("b.csv", table(700, ("question", "answer")), 1)]
    sources = [{"weight": 1}, {"rows": 33}]
    alone = {"processes": 1, "part_bytes": 4000}

    one, places = mixed(base, tmp_path / "one", files, sources, **alone)
    three, again = mixed(base, tmp_path / "three", files, sources, processes=3, part_bytes=4000)
    _, other = mixed(base, tmp_path / "other", files, sources, seed=43, **alone)

    assert one == three
    assert places == again
    assert 33 == len(places[1]) == len(other[1])
    assert places[1] != other[1]
    assert places[0] == other[0]  # a weight alone is all rows


def test_samples_are_of_all_parts(base: Path, tmp_path: Path) -> None:
    """Who looks at the first rows sees each part."""
    files = [("a.jsonl", chat(50), 0), ("b.csv", table(40, ("question", "answer")), 1)]

    mixed(base, tmp_path, files, [{}, {}])

    shown = json.loads((tmp_path / "tokenised" / "preview.json").read_text())
    assert ["a.jsonl", "b.csv"] * 2 == [row["where"].split()[0] for row in shown[:4]]


def test_pairs_that_are_rendered_already_change_no_other_part(base: Path, tmp_path: Path) -> None:
    """Whether prompts hold the chat format is asked of each part, side by side as well."""
    raw = b"".join(
        json.dumps({"prompt": f"<|im_start|>user\n{n}<|im_end|>\n", "completion": f"a{n}"}).encode()
        + b"\n"
        for n in range(400)
    )
    plain = b"".join(
        json.dumps({"prompt": f"question {n}", "completion": f"a{n}"}).encode() + b"\n"
        for n in range(400)
    )
    for order in ((raw, plain), (plain, raw)):
        files = [(f"{n}.jsonl", content, n) for n, content in enumerate(order)]
        alone, _ = mixed(base, tmp_path / "one", files, [{}, {}], processes=1)
        both, _ = mixed(base, tmp_path / "two", files, [{}, {}], processes=2, part_bytes=3000)

        assert alone == both
        text, chats_ = "pairs as running text", "pairs as a user turn"
        expected = [text, chats_] if order[0] is raw else [chats_, text]
        for source, words in zip(alone["sources"], expected, strict=True):
            assert source["rendering"].startswith(words)


def test_each_part_gives_rows_to_the_held_out_ones(base: Path, tmp_path: Path) -> None:
    """A tenth of each, not a tenth of all; what is counted is what is there."""
    files = [("a.jsonl", chat(400), 0), ("b.csv", table(20, ("question", "answer")), 1)]
    mixed(base, tmp_path, files, [{}, {}])
    pack = {
        "step": "pack",
        "tokenised": str(tmp_path / "tokenised"),
        "out": str(tmp_path / "packed"),
        "max_length": 64,
        "packing": False,
        "over_length": None,
        "shuffle": True,
        "seed": 1,
        "shuffle_seed": None,
        "train_share": 0.9,
        "batch": None,
    }

    packed = work(pack)

    assert [40, 2] == packed["held_out"]
    assert 42 == packed["eval"]["documents"]
    assert 378 == packed["train"]["documents"]


@pytest.mark.parametrize("asked", [{"rows": 51}, {"rows": 5000}])
def test_more_rows_than_there_are_is_refused_with_both_numbers(
    base: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    """A row twice an epoch is no row more."""
    with pytest.raises(DataError) as refused:
        mixed(base, tmp_path, [("a.jsonl", chat(50), 0)], [asked])

    (problem,) = refused.value.problems
    assert "DATA-262" == problem.code
    assert f"asks for {asked['rows']:,} rows, and 0 has 50" in problem.what


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "DATA-201"),
        (chat(20)[:-30], "DATA-203"),
        (b'{"messages": "none"}\n', "DATA-"),
        (b'{"unknown": 1}\n', "DATA-"),
    ],
)
def test_a_part_that_cannot_be_read_says_so_itself(
    base: Path, tmp_path: Path, content: bytes, code: str
) -> None:
    """Not as too few rows: what is wrong with it, and with the other parts, in one pass."""
    other = chat(20) + b'{"messages": 7}\n'
    with pytest.raises(DataError) as refused:
        mixed(
            base,
            tmp_path,
            [("a.jsonl", content, 0), ("b.jsonl", other, 1)],
            [{"rows": 15}, {"weight": 1}],
        )

    wheres = {problem.where.split()[0]: problem.code for problem in refused.value.problems}
    assert wheres["a.jsonl"].startswith(code), refused.value.problems
