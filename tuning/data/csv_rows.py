"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from tuning.data.formats import quoted
from tuning.data.source import MAX_LINE, Batch, BatchBuilder, Source, lines, text_bytes


def rows(source: Source) -> Iterator[Batch]:
    """The rows of a file with a header line; values are text."""
    csv.field_size_limit(MAX_LINE)
    delimiter = "," if source.kind.format == "csv" else "\t"
    reader = csv.reader(_text_lines(source), delimiter=delimiter, strict=True)
    header: list[str] = []
    builder = BatchBuilder("line")
    start = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            duplicate = next(name for name in header if header.count(name) > 1)
            what = f"the column {quoted(duplicate)} appears twice in the header"
            source.bad("line 1", "DATA-208", what, "name each column once")
            return
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                row: dict[str, Any] = dict(zip(header, fields, strict=True))
                yield from builder.add(start, row, sum(map(len, fields)))
            elif fields:
                what = f"has {len(fields)} fields, the header has {len(header)}"
                change = "put fields that hold a separator, a quote or a line end in quotes"
                source.bad(f"line {start}", "DATA-240", what, change)
            start = reader.line_num + 1
    except _TooLong as error:
        change = "split the row, or check that the file has one row a line"
        what = f"is longer than {MAX_LINE >> 20} MiB"
        source.bad(f"line {error.args[0]}", "DATA-211", what, change)
    except csv.Error as error:
        what = f"is not {source.kind.format.upper()}: {error}"
        if "end of data" in str(error):
            what = f"is not {source.kind.format.upper()}: it opens a quote that is never closed"
        change = "put fields that hold a separator, a quote or a line end in quotes"
        source.bad(f"line {start}", "DATA-240", what, change)
    except UnicodeDecodeError as error:
        what = f"a byte (0x{error.object[error.start]:02x}) is not UTF-8"
        source.bad(f"line {reader.line_num + 1}", "DATA-205", what, "save the file as UTF-8")
    yield from builder.rest()


class _TooLong(Exception):
    """The line of this number is longer than MAX_LINE."""


def _text_lines(source: Source) -> Iterator[str]:
    number = 0
    for raw, unended in lines(text_bytes(source)):
        last = len(raw) - 1
        for index, line in enumerate(raw):
            number += 1
            if len(line) > MAX_LINE:
                raise _TooLong(number)
            yield line.decode() + ("" if unended and index == last else "\n")
