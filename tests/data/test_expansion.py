"""Files that are small on disk and huge in memory are refused before they are huge."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tuning.data import parts, read, sniff
from tuning.data.problems import Problems
from tuning.data.source import Source
from tuning.errors import DataError

MEMORY = 3 << 30  # bytes of address space over what the libraries take; arrow reserves much
LONG = "x" * 900_000
CHILD = """
import resource, sys
from pathlib import Path
from tuning.data import read, sniff
from tuning.data.problems import Problems
from tuning.data.source import Source
from tuning.errors import DataError
path, memory = Path(sys.argv[1]), int(sys.argv[2])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
problems = Problems()
try:
    kind = sniff.sniff(path, path.name, None)
    for batch in read.batches(Source(path, path.name, kind, problems, path.parent)):
        pass
    problems.raise_all()
except DataError as error:
    print(error)
"""


def repeated(count: int) -> pa.Array:
    """One long text, `count` times, as a dictionary."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([LONG]))


def flat_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": repeated(5000)}), path, compression="zstd")


def nested_parquet(path: Path) -> None:
    """Every row a conversation with the same long answer."""
    offsets = pa.array(range(5001), pa.int32())
    turns = pa.StructArray.from_arrays(
        [pa.array(["assistant"] * 5000), repeated(5000)], ["role", "content"]
    )
    table = pa.table({"messages": pa.ListArray.from_arrays(offsets, turns)})
    pq.write_table(table, path, compression="zstd")


def one_row_parquet(path: Path) -> None:
    """A single row with all of it."""
    offsets = pa.array([0, 5000], pa.int32())
    turns = pa.StructArray.from_arrays(
        [pa.array(["assistant"] * 5000), repeated(5000)], ["role", "content"]
    )
    table = pa.table({"messages": pa.ListArray.from_arrays(offsets, turns)})
    pq.write_table(table, path, compression="zstd")


def page_parquet(path: Path) -> None:
    """A page of one long text, which compresses well."""
    table = pa.table({"text": pa.array(["y" * 100_000_000])})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def arrow_dictionary(path: Path) -> None:
    table = pa.table({"text": repeated(5000)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(path), table.schema, options=options) as file:
        file.write_table(table)


def zstd_rows(path: Path) -> None:
    path.write_bytes(zstandard.compress(b" " * (300 << 20), 19))


BOMBS: dict[str, Callable[[Path], None]] = {
    "a.parquet": flat_parquet,
    "b.parquet": nested_parquet,
    "c.parquet": one_row_parquet,
    "d.parquet": page_parquet,
    "e.arrow": arrow_dictionary,
    "f.jsonl.zst": zstd_rows,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_grows_to_gigabytes_is_refused_in_little_memory(
    tmp_path: Path, name: str
) -> None:
    """With three gigabytes more a reader says what is wrong; one that decodes all fails."""
    path = tmp_path / name
    BOMBS[name](path)
    assert path.stat().st_size < 100_000

    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(MEMORY)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert child.stdout.startswith(f"DATA-253 {name}: grows to more than 200 times"), child.stderr


def test_rows_with_a_common_long_text_are_read_whole(tmp_path: Path) -> None:
    """The same system prompt in each row is no attack: each row comes as it was written."""
    rows = [{"prompt": "s" * 5000, "completion": f"answer {n}"} for n in range(3000)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    problems = Problems()

    source = Source(path, path.name, sniff.FileType("parquet"), problems, tmp_path)
    found = [row for batch in read.batches(source) for row in batch.rows]

    problems.raise_all()
    assert rows == found


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_a_zstd_file_that_is_cut_is_named(tmp_path: Path, cut: int) -> None:
    data = zstandard.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(9000)))
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(data[:-cut])

    with pytest.raises(DataError, match=r"DATA-203 .*zstd file that ends too early"):
        list(sniff.chunks(path, "zstd", path.name))


def test_two_zstd_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(b"a\n" * 9) + zstandard.compress(b"b\n"))

    assert b"a\n" * 9 + b"b\n" == b"".join(sniff.chunks(path, "zstd", path.name))


def test_a_file_of_one_huge_line_is_split_without_reading_the_line(tmp_path: Path) -> None:
    """The parts of a file are found in pieces, also where a line has no end."""
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(300 << 20)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    (part,) = parts.split(path, sniff.FileType("jsonl"))

    assert (0, 300 << 20) == (part.begin, part.end)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
