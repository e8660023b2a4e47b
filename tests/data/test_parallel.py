"""Reading data side by side: the same rows, the same words, whoever reads them."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import chats
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuning.data import read_progress
from tuning.data.__main__ import work
from tuning.data.parts import split
from tuning.data.sniff import FileType
from tuning.errors import DataError

ABOUT = 20_000  # bytes of a part


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.save("chatml", tmp_path_factory.mktemp("chatml"))


def row(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    words = " ".join(draw.choices(["two", "plus", "is", "ä", "four\n"], k=draw.randint(1, 40)))
    return {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": words},
        ]
    }


def write(folder: Path) -> list[dict[str, str]]:
    """A long JSONL with blank lines and no last newline, parquet, CSV and gzip."""
    rows = [row(n) for n in range(400)]
    lines = [
        json.dumps(r, ensure_ascii=False) + ("\n" if n % 7 else "\n\n") for n, r in enumerate(rows)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row(n) for n in range(300)]), sink, row_group_size=37)
    contents = {
        "a.jsonl": "\ufeff".encode() + "".join(lines).rstrip("\n").encode(),
        "b.parquet": sink.getvalue(),
        "c.jsonl.gz": gzip.compress("".join(lines).encode()),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [{"path": str(folder / name), "shown": name} for name in contents]


def tokenise(base: Path, out: Path, files: list[dict[str, str]], processes: int) -> dict[str, Any]:
    return work(
        {
            "step": "tokenise",
            "files": files,
            "base": str(base),
            "out": str(out),
            "settings": {},
            "processes": processes,
            "part_bytes": ABOUT,
        }
    )


def rows_of(out: Path) -> dict[str, Any]:
    with pa.memory_map(str(out / "rows.arrow")) as mapped, pa.ipc.open_file(mapped) as reader:
        found: dict[str, Any] = reader.read_all().to_pydict()
    return found


def test_three_processes_give_what_one_gives(base: Path, tmp_path: Path) -> None:
    """Rows, their places, the answer and the preview: nothing tells how many processes read."""
    files = write(tmp_path)

    one = tokenise(base, tmp_path / "one", files, 1)
    three = tokenise(base, tmp_path / "three", files, 3)

    assert one == three
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "three")
    assert [400, 300, 400] == [file["rows"] for file in one["files"]]
    previews = [(tmp_path / out / "preview.json").read_bytes() for out in ("one", "three")]
    assert previews[0] == previews[1]
    assert not list((tmp_path / "three").glob(".parts-*"))


def test_what_is_wrong_is_said_alike(base: Path, tmp_path: Path) -> None:
    """Problems come from every part, with their true lines."""
    files = write(tmp_path)
    path = tmp_path / "a.jsonl"
    lines = path.read_text().split("\n")
    lines[150] = '{"messages": "none"}'
    lines[333] = lines[333][:20]
    path.write_text("\n".join(lines))

    with pytest.raises(DataError) as one:
        tokenise(base, tmp_path / "one", files, 1)
    with pytest.raises(DataError) as three:
        tokenise(base, tmp_path / "three", files, 3)

    assert set(one.value.problems) == set(three.value.problems)
    wheres = sorted(problem.where for problem in three.value.problems)
    assert ["a.jsonl line 151", "a.jsonl line 334"] == [w.partition(" (")[0] for w in wheres]


def test_an_error_that_ends_it_ends_all_processes(base: Path, tmp_path: Path) -> None:
    """A damaged part's error reaches the caller, and no process is left behind."""
    path = tmp_path / "a.jsonl"
    broken = "".join("{broken\n" for _ in range(11_000))
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(500)) + broken)

    with pytest.raises(DataError, match="stopped reading after 10000 problems"):
        tokenise(base, tmp_path / "out", [{"path": str(path), "shown": "a.jsonl"}], 2)

    assert not (tmp_path / "out" / "rows.arrow").exists()
    assert not list((tmp_path / "out").glob(".parts-*"))


def test_parts_cover_a_file_once(tmp_path: Path) -> None:
    """Parts of lines end at line ends, know the lines before them, and leave nothing out."""
    path = tmp_path / "a.jsonl"
    whole = b"".join(b"x" * (n % 97) + b"\n" for n in range(3000)) + b"no end"
    path.write_bytes(whole)

    parts = split(path, FileType("jsonl"), part_bytes=10_000)

    texts = [whole[part.begin : part.end] for part in parts]
    assert whole == b"".join(texts)
    assert len(parts) > 10
    assert all(text.endswith(b"\n") for text in texts[:-1])
    befores = [whole[: part.begin].count(b"\n") for part in parts]
    assert befores == [part.before for part in parts]


def test_progress_is_written_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds the bytes done and the total."""
    monkeypatch.setattr(read_progress, "INTERVAL_SECONDS", 0.0)
    progress = read_progress.ReadProgress(tmp_path / "progress", 100)

    progress.add(30)
    progress.add(12)

    assert (42, 100) == read_progress.read(tmp_path / "progress")
    assert read_progress.read(tmp_path / "none") is None
