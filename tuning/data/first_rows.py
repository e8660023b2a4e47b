"""The first rows of a file, judged before the file is downloaded or read in whole.

Of a file that is elsewhere only what its first bytes show: the columns of JSONL, CSV and TSV. Of
parquet, arrow, JSON arrays and zstd there is the format alone. Of a file that is here all of them.
It loads no torch, so that `check` can call it.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tuning.data import json_rows, separated, sniff
from tuning.data.formats import BadRow, Columns, Shape, detect, quoted, to_example, unused
from tuning.data.problems import Problems
from tuning.data.source import Batch, Source
from tuning.errors import DataError

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
    read = json_rows.one_a_line if kind.format == "jsonl" else separated.rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "head")
        path.write_bytes(text)
        source = Source(path, shown, kind, Problems(), Path(folder))
        return _judged(source, read(source), columns)


def glance_at(path: Path, shown: str, *, columns: Columns, extension: str | None) -> Glance:
    """What the file at `path` is. Raises DataError with all that is wrong with its first rows."""
    from tuning.data import read

    kind = sniff.sniff(path, shown, extension)
    named = frozenset(filter(None, (columns.messages, columns.context, columns.response)))
    with tempfile.TemporaryDirectory() as folder:
        source = Source(path, shown, kind, Problems(), Path(folder), named)
        shape, left = _judged(source, read.batches(source), columns)
    if shape is None:
        raise DataError.at("DATA-201", shown, "holds no rows", "give a file with rows")
    name = f"{kind.format} in {kind.compression}" if kind.compression else kind.format
    return Glance(name, shape, left)


def _judged(
    source: Source, batches: Iterator[Batch], columns: Columns
) -> tuple[Shape | None, tuple[str, ...]]:
    """The shape of the first row, and what of it is not read."""
    shape: Shape | None = None
    left: tuple[str, ...] = ()
    problems = source.problems
    for batch in islice(batches, 1):
        for place, row in zip(batch.places, batch.rows, strict=True):
            try:
                if shape is None:
                    shape = detect(row, columns)
                    left = tuple(unused(row, shape))
                to_example(row, shape)
            except BadRow as bad:
                for fault in bad.faults:
                    where = f"{source.shown} {batch.unit} {place}"
                    problems.add(fault.code, where, fault.what, fault.change)
                if shape is None:
                    break
    problems.raise_all()
    return shape, left
