"""Splits large files into parts, so that several processes can read one file in parallel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuning.data.sniff import CHUNK, FileType

PART_BYTES = 16 << 20  # a part takes seconds to read, and a process one second to start


@dataclass(frozen=True)
class Part:
    """A range of one file, or all of it."""

    begin: int = 0  # byte of a text file, row group of a parquet file
    end: int | None = None  # exclusive; None for the end of the file
    before: int = 0  # lines or rows of the file before it
    size: int = 0  # bytes on disk


def split(path: Path, kind: FileType, *, part_bytes: int = PART_BYTES) -> list[Part]:
    """Parts of about `part_bytes`: whole lines of JSONL, whole row groups of parquet.

    Every other file is one part.
    """
    size = path.stat().st_size
    if size >= 2 * part_bytes and kind.compression is None:
        if kind.format == "jsonl":
            return list(_lines(path, size, part_bytes))
        if kind.format == "parquet":
            return _row_groups(path, size, part_bytes)
    return [Part(size=size)]


def _lines(path: Path, size: int, part_bytes: int) -> Iterator[Part]:
    begin, before = 0, 0
    with path.open("rb") as file:
        while begin < size:
            lines = 0
            while (remaining := begin + part_bytes - file.tell()) > 0:
                piece = file.read(min(CHUNK, remaining))
                if not piece:
                    break
                lines += piece.count(b"\n")
            while rest := file.readline(CHUNK):  # up to the end of the line
                if rest.endswith(b"\n"):
                    lines += 1
                    break
            end = file.tell()
            yield Part(begin, end, before, end - begin)
            begin, before = end, before + lines


def _row_groups(path: Path, size: int, part_bytes: int) -> list[Part]:
    import pyarrow as pa  # here, since a run's parent imports this module and reads no parquet
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return [Part(size=size)]  # reading it raises the error
    parts: list[Part] = []
    begin, before, rows, held = 0, 0, 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows += group.num_rows
        held += sum(group.column(n).total_compressed_size for n in range(group.num_columns))
        if held >= part_bytes or number == metadata.num_row_groups - 1:
            parts.append(Part(begin, number + 1, before, held))
            begin, before, rows, held = number + 1, before + rows, 0, 0
    return parts or [Part(size=size)]
