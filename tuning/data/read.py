"""Files -> batches of rows with their places, in memory independent of the size of the file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from tuning.data import csv_rows, expansion, json_rows, sniff
from tuning.data.formats import KNOWN_COLUMNS, UNREAD, quoted
from tuning.data.source import BATCH_BYTES, BATCH_ROWS, Batch, Source
from tuning.errors import DataError

_NULLS = (
    "arguments of tool calls that are null in the table are left out, since a struct has the keys "
    "of all rows: write arguments as JSON text to keep them"
)


def batches(source: Source) -> Iterator[Batch]:
    """The rows of `source`. Adds a problem for each unreadable row, and for a file that is cut.

    Raises DataError if there are too many problems.
    """
    readers = {
        "parquet": _parquet,
        "arrow": _arrow,
        "arrow-stream": _arrow,
        "jsonl": json_rows.one_a_line,
        "json": json_rows.values,
        "csv": csv_rows.rows,
        "tsv": csv_rows.rows,
    }
    try:
        yield from readers[source.kind.format](source)
    except DataError as error:
        if len(error.problems) > 1:  # from the collector: too many
            raise
        source.problems.extend(error.problems)


def _parquet(source: Source) -> Iterator[Batch]:
    with _uncompressed(source) as path:
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                names = file.schema_arrow.names
                used = _used(names, source)
                part = source.part
                end = file.num_row_groups if part.end is None else part.end
                groups = list(range(part.begin, end))
                rows = sum(file.metadata.row_group(n).num_rows for n in groups)
                size, at_once = _measure(file, groups, used)
                if size > sniff.most_bytes(source.path.stat().st_size):
                    raise sniff.too_much(source.shown)
                texts = expansion.dense(file, path, groups, used)
            with pq.ParquetFile(path, pre_buffer=False, read_dictionary=texts) as file:
                tables = file.iter_batches(at_once, groups, columns=used, use_threads=False)
                for batch in _batches(tables, names, source, before=part.before):
                    yield batch
                    source.tick(part.size * len(batch.rows) // rows)
        except (pa.ArrowException, OSError) as error:
            source.bad("", *_unreadable("parquet", error))


def _arrow(source: Source) -> Iterator[Batch]:
    open_reader = pa.ipc.open_file if source.kind.format == "arrow" else pa.ipc.open_stream
    with _uncompressed(source) as path:
        try:
            with pa.memory_map(str(path)) as mapped, open_reader(mapped) as reader:
                if source.kind.format == "arrow":
                    tables = (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    tables = iter(reader)
                names = reader.schema.names
                used = _used(names, source)
                parts = (
                    table.select(used).slice(start, BATCH_ROWS)
                    for table in tables
                    for start in range(0, table.num_rows, BATCH_ROWS)
                )
                yield from _batches(parts, names, source)
                source.tick(source.part.size)
        except (pa.ArrowException, OSError) as error:
            source.bad("", *_unreadable("arrow", error))


def _unreadable(name: str, error: Exception) -> tuple[str, str, str]:
    reason = quoted(str(error).splitlines()[0] if str(error) else type(error).__name__)
    what = f"is a {name} file that cannot be read, probably cut: {reason}"
    return "DATA-237", what, "download or write it again"


def _used(names: list[str], source: Source) -> list[str]:
    """The columns to read: others may be large, or of types that Python lacks."""
    return [name for name in names if name in KNOWN_COLUMNS or name in source.columns]


def _batches(
    tables: Iterable[pa.RecordBatch], names: list[str], source: Source, *, before: int = 0
) -> Iterator[Batch]:
    number, budget = before, expansion.Budget(source)
    for table in tables:
        for small in map(_without_dictionaries, expansion.slices(table, budget)):
            places = list(range(number + 1, number + 1 + small.num_rows))
            number += small.num_rows
            read = small.schema.names
            unread = dict.fromkeys((name for name in names if name not in read), UNREAD)
            rows = small.to_pylist()
            lost: set[str] = set()
            if tools := [field.name for field in small.schema if _holds_tools(field)]:
                for row in rows:
                    row |= {
                        name: _without_nulls(row[name], lost, inside=name == "tools")
                        for name in tools
                    }
            notes = (_NULLS,) if "arguments" in lost else ()
            yield Batch("row", places, [row | unread for row in rows] if unread else rows, notes)


def _measure(file: pq.ParquetFile, groups: list[int], used: list[str]) -> tuple[int, int]:
    """The bytes of the row groups without compression, as the file says, and rows of a batch.

    A batch has BATCH_ROWS, or fewer if they are long.
    """
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
    return size, max(1, min(BATCH_ROWS, 4 * BATCH_BYTES * rows // max(1, size)))


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` with decoded dictionaries, which reads faster."""
    if not any(pa.types.is_dictionary(field.type) for field in batch.schema):
        return batch
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _holds_tools(field: pa.Field) -> bool:
    """Whether a column holds tools, or calls of them, as structs."""
    return pa.types.is_nested(field.type) and (field.name == "tools" or "_call" in str(field.type))


def _without_nulls(value: Any, lost: set[str], *, inside: bool = False, key: str = "") -> Any:
    """`value`, which stands under `key`, without nulls `inside` of tools and calls.

    A struct has the keys of all rows: each tool gets the arguments of all others, as nulls. Adds
    the keys of objects that had nulls to `lost`.
    """
    if isinstance(value, list):
        return [_without_nulls(each, lost, inside=inside, key=key) for each in value]
    if not isinstance(value, dict):
        return value
    calls = ("tool_calls", "function_call", "function")
    if inside and None in value.values():
        lost.add(key)
    return {
        name: _without_nulls(each, lost, inside=inside or name in calls, key=name)
        for name, each in value.items()
        if not (inside and each is None)
    }


@contextlib.contextmanager
def _uncompressed(source: Source) -> Iterator[Path]:
    """The file itself, or a temporary uncompressed copy."""
    if source.kind.compression is None:
        yield source.path
        return
    with tempfile.TemporaryDirectory(dir=source.scratch, prefix=".plain-") as folder:
        copy = Path(folder, "file")
        with copy.open("wb") as out:
            for piece in sniff.chunks(source.path, source.kind.compression, source.shown):
                out.write(piece)
        yield copy
