"""Files -> batches of rows, each with its place, in memory that does not grow with the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from tuning.data import json_rows, separated, sniff
from tuning.data.formats import KNOWN_COLUMNS, UNREAD, quoted
from tuning.data.source import BYTES, ROWS, Batch, Source
from tuning.errors import DataError


def batches(source: Source) -> Iterator[Batch]:
    """The rows of `source`. A row that cannot be read is noted and left out.

    Raises DataError when there are too many problems; what ends a file early is noted as one.
    """
    readers = {
        "parquet": _parquet,
        "arrow": _arrow,
        "arrow-stream": _arrow,
        "jsonl": json_rows.one_a_line,
        "json": json_rows.values,
        "csv": separated.rows,
        "tsv": separated.rows,
    }
    try:
        yield from readers[source.kind.format](source)
    except DataError as error:
        if len(error.problems) > 1:  # the collector has had enough
            raise
        source.problems.extend(error.problems)


def _parquet(source: Source) -> Iterator[Batch]:
    with _plain_file(source) as path:
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                names = file.schema_arrow.names
                used = _used(names, source)
                part = source.part
                end = file.num_row_groups if part.end is None else part.end
                groups = list(range(part.begin, end))
                rows = sum(file.metadata.row_group(n).num_rows for n in groups)
                found = file.iter_batches(
                    batch_size=_rows_at_once(file, groups, used),
                    row_groups=groups,
                    columns=used,
                    use_threads=False,
                )
                for batch in _tables(found, names, before=part.before):
                    yield batch
                    source.tick(part.size * len(batch.rows) // rows)
        except (pa.ArrowException, OSError) as error:
            source.bad("", *_unreadable("parquet", error))


def _arrow(source: Source) -> Iterator[Batch]:
    opened = pa.ipc.open_file if source.kind.format == "arrow" else pa.ipc.open_stream
    with _plain_file(source) as path:
        try:
            with pa.memory_map(str(path)) as mapped, opened(mapped) as reader:
                if source.kind.format == "arrow":
                    found = (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    found = iter(reader)
                names = reader.schema.names
                used = _used(names, source)
                parts = (
                    batch.select(used).slice(start, ROWS)
                    for batch in found
                    for start in range(0, batch.num_rows, ROWS)
                )
                yield from _tables(parts, names)
                source.tick(source.part.size)
        except (pa.ArrowException, OSError) as error:
            source.bad("", *_unreadable("arrow", error))


def _unreadable(name: str, error: Exception) -> tuple[str, str, str]:
    said = quoted(str(error).splitlines()[0] if str(error) else type(error).__name__)
    what = f"is a {name} file that cannot be read, probably cut: {said}"
    return "DATA-237", what, "download or write it again"


def _used(names: list[str], source: Source) -> list[str]:
    """The columns that may matter: others can be large, or of types that Python has not."""
    return [name for name in names if name in KNOWN_COLUMNS or name in source.wanted]


def _tables(
    found: Iterable[pa.RecordBatch], names: list[str], *, before: int = 0
) -> Iterator[Batch]:
    number = before
    for large in found:
        for batch in _small(_spelled_out(large)):
            places = list(range(number + 1, number + 1 + batch.num_rows))
            number += batch.num_rows
            here = batch.schema.names
            unused = dict.fromkeys((name for name in names if name not in here), UNREAD)
            rows = batch.to_pylist()
            if filled := [field.name for field in batch.schema if _may_be_filled(field)]:
                for row in rows:
                    row |= {name: _unfilled(row[name], inside=name == "tools") for name in filled}
            yield Batch("row", places, [row | unused for row in rows] if unused else rows)


def _rows_at_once(file: pq.ParquetFile, groups: list[int], used: list[str]) -> int:
    """How many rows of a parquet file make a batch: ROWS, or fewer if they are long."""
    size = rows = 0
    for number in groups:
        group = file.metadata.row_group(number)
        rows += group.num_rows
        columns = (group.column(index) for index in range(group.num_columns))
        size += sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] in used
        )
    return max(1, min(ROWS, 4 * BYTES * rows // max(1, size)))


def _spelled_out(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` without dictionaries, which count in whole for every part of it."""
    if not any(pa.types.is_dictionary(field.type) for field in batch.schema):
        return batch
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """`batch` in halves of halves, until each is of bounded size or a single row."""
    waiting = [batch]
    while waiting:
        part = waiting.pop()
        if part.num_rows > 1 and part.nbytes > BYTES:
            half = part.num_rows // 2
            waiting += [part.slice(half), part.slice(0, half)]
        else:
            yield part


def _may_be_filled(field: pa.Field) -> bool:
    """Whether a column holds tools, or calls of them, as structs."""
    return pa.types.is_nested(field.type) and (field.name == "tools" or "_call" in str(field.type))


def _unfilled(value: Any, *, inside: bool = False) -> Any:
    """`value` without the nulls with which a table fills keys that a row never had.

    A struct has the keys of all rows: two tools give each other their arguments. Only what is
    `inside` tools and calls of them is a stranger's words; what a message lacks we know ourselves.
    """
    if isinstance(value, list):
        return [_unfilled(each, inside=inside) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _unfilled(each, inside=inside or key in ("tool_calls", "function_call", "function"))
        for key, each in value.items()
        if not (inside and each is None)
    }


class _plain_file:
    """The file itself, or an uncompressed copy of it for the time of a `with`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        source = self._source
        if source.kind.compression is None:
            return source.path
        self._folder = tempfile.TemporaryDirectory(dir=source.scratch, prefix=".plain-")
        copy = Path(self._folder.name, "file")
        with copy.open("wb") as out:
            for piece in sniff.chunks(source.path, source.kind.compression, source.shown):
                out.write(piece)
        return copy

    def __exit__(self, *_: object) -> None:
        if self._folder:
            self._folder.cleanup()
