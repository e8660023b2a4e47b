"""The first rows of a file, judged before the file is downloaded or read.

Only what text shows at once: the columns of JSONL, CSV and TSV. Of parquet, arrow, JSON arrays and
zstd there is the format alone. It loads nothing heavy, so that `check` can call it.
"""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tuning.data import json_rows, separated, sniff
from tuning.data.problems import Problems
from tuning.data.source import Source
from tuning.formats import BadRow, Columns, Shape, detect, quoted, to_example, unused

HEAD = 64 << 10  # bytes that are enough


@dataclass(frozen=True)
class Glance:
    """What the beginning of a file tells."""

    format: str
    shape: Shape | None = None
    unused: tuple[str, ...] = ()  # columns of the first row that are not read

    def __str__(self) -> str:
        if self.shape is None:
            return self.format
        left = ", ".join(map(quoted, self.unused[:12]))
        told = f"{self.format}, {self.shape.name}: {self.shape.reason}"
        return f"{told}; not read: {left}" if left else told


def glance(
    head: bytes, shown: str, *, whole: bool, columns: Columns, extension: str | None = None
) -> Glance:
    """What a file that begins with `head` is; `whole` says that nothing follows.

    Raises DataError with all that is wrong with its first rows.
    """
    compression = sniff.compression_of(head)
    if compression == "zstd":
        return Glance("zstd")
    if compression == "gzip":
        try:
            head, whole = zlib.decompressobj(wbits=31).decompress(head, HEAD), False
        except zlib.error:
            return Glance("gzip, damaged or unusual")  # whoever reads all of it says what it is
    format = sniff.format_of(head, _name(shown, extension))
    name = f"{format} in {compression}" if compression else format
    text = head if whole else _whole_rows(head, format)
    if format not in ("jsonl", "csv", "tsv") or not text.strip():
        return Glance(name)
    return Glance(name, *_shape(text, shown, sniff.Kind(format), columns))


def _name(shown: str, extension: str | None) -> str:
    return f"{shown}.{extension}" if extension else shown


def _whole_rows(head: bytes, format: str) -> bytes:
    """`head` up to the end of its last whole row."""
    text = head.rpartition(b"\n")[0]
    while format != "jsonl" and text.count(b'"') % 2:  # a line end inside a quoted field
        text = text.rpartition(b"\n")[0]
    return text + b"\n" if text else b""


def _shape(
    text: bytes, shown: str, kind: sniff.Kind, columns: Columns
) -> tuple[Shape | None, tuple[str, ...]]:
    problems = Problems()
    read = json_rows.one_a_line if kind.format == "jsonl" else separated.rows
    shape: Shape | None = None
    left: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "head")
        path.write_bytes(text)
        for batch in islice(read(Source(path, shown, kind, problems, Path(folder))), 1):
            for place, row in zip(batch.places, batch.rows, strict=True):
                try:
                    if shape is None:
                        shape = detect(row, columns)
                        left = tuple(unused(row, shape))
                    to_example(row, shape)
                except BadRow as bad:
                    for fault in bad.faults:
                        where = f"{shown} {batch.unit} {place}"
                        problems.add(fault.code, where, fault.what, fault.change)
                    if shape is None:
                        break
    problems.raise_all()
    return shape, left
