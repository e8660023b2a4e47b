"""Validates the first rows of a file before it is downloaded or read completely.

Of a remote file there are only the first bytes: the columns of JSONL, CSV and TSV, and the format
of all others. Of a local file every format is read. Loads no torch, so that `check` can call it.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tuning.data import csv_rows, json_rows, sniff
from tuning.data.formats import (
    BadRow,
    Columns,
    Conversation,
    Plain,
    Shape,
    detect,
    documents,
    example_of,
    left_out,
    objective_of,
    quoted,
    unused,
)
from tuning.data.problems import Problems
from tuning.data.source import Batch, Source
from tuning.data.vocabulary import Vocabulary
from tuning.errors import DataError

HEAD = 64 << 10  # bytes to decompress


@dataclass(frozen=True)
class FirstRows:
    """The format of a file and the shape of its first row."""

    format: str
    shape: Shape | None = None
    unused: tuple[str, ...] = ()  # columns of the first rows that are not read
    chats: bool = False  # some need a chat template

    def __str__(self) -> str:
        if self.shape is None:
            return self.format
        text = f"{self.format}, {self.shape.name}: {self.shape.reason}"
        ignored = ", ".join(map(quoted, self.unused[:12]))
        return f"{text}; not read: {ignored}" if ignored else text


def check_head(
    head: bytes,
    shown: str,
    *,
    whole: bool,
    columns: Columns,
    extension: str | None = None,
    vocabulary: Vocabulary | None = None,
) -> FirstRows:
    """Validate a file that begins with `head`, or consists of it (`whole`).

    Raises DataError with all problems of its first rows.
    """
    compression = sniff.compression_of(head)
    if compression == "zstd":
        return FirstRows("zstd")
    if compression == "gzip":
        try:
            head, whole = zlib.decompressobj(wbits=31).decompress(head, HEAD), False
        except zlib.error:
            return FirstRows("gzip, damaged or unusual")  # reading the file says more
    format = sniff.format_of(head, shown, extension)
    name = f"{format} in {compression}" if compression else format
    text = head if whole else _complete_rows(head, format)
    if format not in ("jsonl", "csv", "tsv") or not text.strip():
        return FirstRows(name)
    read = json_rows.one_a_line if format == "jsonl" else csv_rows.rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "head")
        path.write_bytes(text)
        source = Source(path, shown, sniff.FileType(format), Problems(), Path(folder))
        return FirstRows(name, *_check_rows(source, read(source), columns, vocabulary))


def _complete_rows(head: bytes, format: str) -> bytes:
    """`head` up to the end of its last complete row."""
    text = head.rpartition(b"\n")[0]
    while format != "jsonl" and text.count(b'"') % 2:  # a line end inside a quoted field
        text = text.rpartition(b"\n")[0]
    return text + b"\n" if text else b""


def check_file(
    path: Path,
    shown: str,
    *,
    columns: Columns,
    extension: str | None,
    vocabulary: Vocabulary | None = None,
) -> FirstRows:
    """Validate the file at `path`. Raises DataError with all problems of its first rows."""
    from tuning.data import read

    kind = sniff.sniff(path, shown, extension)
    with tempfile.TemporaryDirectory() as folder:
        source = Source(path, shown, kind, Problems(), Path(folder), columns.named)
        shape, ignored, chats = _check_rows(source, read.batches(source), columns, vocabulary)
    if shape is None:
        raise DataError.at("DATA-201", shown, "holds no rows", "give a file with rows")
    name = f"{kind.format} in {kind.compression}" if kind.compression else kind.format
    return FirstRows(name, shape, ignored, chats)


def _check_rows(
    source: Source,
    batches: Iterator[Batch],
    columns: Columns,
    vocabulary: Vocabulary | None,
) -> tuple[Shape | None, tuple[str, ...], bool]:
    """The shape of the first rows, their ignored columns, and whether some are conversations.

    Raises DataError.
    """
    shape: Shape | None = None
    chats = False
    ignored: dict[str, None] = {}
    for batch in islice(batches, 1):
        examples: list[tuple[int, Plain]] = []
        for place, row in zip(batch.places, batch.rows, strict=True):
            try:
                if shape is None:
                    shape = detect(row, columns)
                example = example_of(row, shape, columns)
                ignored |= dict.fromkeys(unused(row, shape))
                if left_out(row, shape):
                    continue
                made = documents(example, objective_of(shape, columns.objective))
                examples += [(place, each) for answers, _ in made for each in answers]
            except BadRow as bad:
                for fault in bad.faults:
                    source.bad(f"{batch.unit} {place}", fault.code, fault.what, fault.change)
                if shape is None:
                    break
        chats = any(isinstance(example, Conversation) for _, example in examples)
        faults = (vocabulary or Vocabulary()).faults([each for _, each in examples])
        for (place, _), wrong in zip(examples, faults, strict=True):
            if wrong:
                source.bad(f"{batch.unit} {place}", wrong.code, wrong.what, wrong.change)
    source.problems.raise_all()
    return shape, tuple(ignored), chats
