"""Rows of text files whose columns are separated: CSV and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from tuning.data.source import MAX_LINE, ROWS, Batch, Source, lines, text_bytes
from tuning.formats import quoted


def rows(source: Source) -> Iterator[Batch]:
    """The rows of a file with one header line, values as text."""
    csv.field_size_limit(MAX_LINE)
    delimiter = "," if source.kind.format == "csv" else "\t"
    reader = csv.reader(_text_lines(source), delimiter=delimiter, strict=True)
    header: list[str] = []
    places: list[int] = []
    made: list[dict[str, Any]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            what = f"the column {quoted(twice)} stands twice in the header"
            source.bad("line 1", "DATA-208", what, "name each column once")
            return
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                made.append(dict(zip(header, fields, strict=True)))
                places.append(start)
            elif fields:
                what = f"has {len(fields)} fields, the header has {len(header)}"
                change = "put fields that hold a separator, a quote or a line end in quotes"
                source.bad(f"line {start}", "DATA-240", what, change)
            start = reader.line_num + 1
            if len(made) == ROWS:
                yield Batch("line", places, made)
                places, made = [], []
    except csv.Error as error:
        what = f"is not {source.kind.format.upper()}: {error}"
        change = "put fields that hold a separator, a quote or a line end in quotes"
        source.bad(f"line {reader.line_num}", "DATA-240", what, change)
    except UnicodeDecodeError as error:
        what = f"a byte (0x{error.object[error.start]:02x}) is not UTF-8"
        source.bad(f"line {reader.line_num + 1}", "DATA-205", what, "save the file as UTF-8")
    if made:
        yield Batch("line", places, made)


def _text_lines(source: Source) -> Iterator[str]:
    for raw, unended in lines(text_bytes(source)):
        last = len(raw) - 1
        for index, line in enumerate(raw):
            yield line.decode() + ("" if unended and index == last else "\n")
