"""Large files in parts, so that several processes can read one file side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tuning.data.sniff import CHUNK, Kind

PART = 16 << 20  # bytes; a part takes seconds, and starting a process takes one


@dataclass(frozen=True)
class Part:
    """A stretch of one file, or all of it."""

    begin: int = 0  # byte of a text file, row group of a parquet file
    end: int | None = None  # one past the last, or None for the end of the file
    before: int = 0  # lines or rows of the file that stand before it
    size: int = 0  # bytes on the disk

    @property
    def opens(self) -> bool:
        """Whether it holds the beginning of the file."""
        return self.begin == 0


def divide(path: Path, kind: Kind, *, about: int = PART) -> list[Part]:
    """The file in parts of `about` so many bytes, where its format has places to cut at.

    Lines are cut at line ends and parquet between row groups. All else is one part.
    """
    size = path.stat().st_size
    if size >= 2 * about and kind.compression is None:
        if kind.format == "jsonl":
            return list(_lines(path, size, about))
        if kind.format == "parquet":
            return _row_groups(path, size, about)
    return [Part(size=size)]


def _lines(path: Path, size: int, most: int) -> Iterator[Part]:
    begin, before = 0, 0
    with path.open("rb") as file:
        while begin < size:
            lines = 0
            while (left := begin + most - file.tell()) > 0:
                piece = file.read(min(CHUNK, left))
                if not piece:
                    break
                lines += piece.count(b"\n")
            rest = file.readline()  # to the end of the line that the cut fell into
            lines += rest.endswith(b"\n")
            end = file.tell()
            yield Part(begin, end, before, end - begin)
            begin, before = end, before + lines


def _row_groups(path: Path, size: int, most: int) -> list[Part]:
    try:
        found = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return [Part(size=size)]  # whoever reads it says what is wrong with it
    parts: list[Part] = []
    begin, before, rows, held = 0, 0, 0, 0
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        rows += group.num_rows
        held += sum(group.column(n).total_compressed_size for n in range(group.num_columns))
        if held >= most or number == found.num_row_groups - 1:
            parts.append(Part(begin, number + 1, before, held))
            begin, before, rows, held = number + 1, before + rows, 0, 0
    return parts or [Part(size=size)]
