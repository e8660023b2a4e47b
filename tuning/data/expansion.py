"""How large columns become when they are decoded, measured before they are.

Dictionaries and shared buffers let a file of a kilobyte hold gigabytes. A file may grow by
`sniff.MAX_RATIO`, or to `sniff.FREE_BYTES`; batches are cut by their decoded size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuning.data import sniff
from tuning.data.source import BATCH_BYTES, Source

ROOMY = 64  # times its size: what a row group may hold by its longest text, without being measured
_VIEWS = (pa.types.is_string_view, pa.types.is_binary_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class Budget:
    """The decoded bytes that a file may still give."""

    def __init__(self, source: Source) -> None:
        self._shown = source.shown
        self._left = sniff.most_bytes(source.path.stat().st_size)

    def take(self, size: int) -> None:
        """Count `size` bytes. Raises DataError if they are too many."""
        self._left -= size
        if self._left < 0:
            raise sniff.too_much(self._shown)


def slices(batch: pa.RecordBatch, budget: Budget) -> Iterator[pa.RecordBatch]:
    """`batch` in slices of at most BATCH_BYTES when decoded, or of one row. Raises DataError."""
    stack = [batch]
    while stack:
        part = stack.pop()
        size = sum(decoded_bytes(column) for column in part.columns)
        if part.num_rows > 1 and size > BATCH_BYTES:
            half = part.num_rows // 2
            stack += [part.slice(half), part.slice(0, half)]
            continue
        budget.take(size)
        yield part


def decoded_bytes(column: pa.Array) -> int:
    """The bytes of the values of `column`, without dictionaries and shared buffers."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _sum(_lengths(column.dictionary).take(column.indices))
    if any(is_view(kind) for is_view in _VIEWS):
        return _sum(_lengths(column))
    if pa.types.is_struct(kind):
        return len(column) + sum(decoded_bytes(child) for child in column.flatten())
    if any(is_list(kind) for is_list in _LISTS):
        return len(column) + decoded_bytes(column.flatten())
    if pa.types.is_run_end_encoded(kind):
        return len(column) * max(1, decoded_bytes(column.values))
    return int(column.nbytes)


def _sum(lengths: pa.Array) -> int:
    return int(pc.sum(lengths).as_py() or 0)


def _lengths(values: pa.Array) -> pa.Array:
    """Bytes of each value."""
    try:
        return pc.cast(pc.binary_length(values), pa.int64())
    except pa.ArrowNotImplementedError:  # numbers, and views before their kernel exists
        each = max((len(str(value)) for value in values.to_pylist()), default=0)
        return pa.array([each] * len(values), pa.int64())


def dense(file: pq.ParquetFile, path: Any, groups: list[int], used: list[str]) -> list[str]:
    """The columns of texts in which a dictionary may hide far more than the file's size.

    Reading them as dictionaries costs time, so that it is done only for these. The longest text of
    a row group's dictionary bounds what the group can hold.
    """
    leaves = [
        (index, column.path)
        for index, column in enumerate(file.schema)
        if column.path.partition(".")[0] in used and column.physical_type == "BYTE_ARRAY"
    ]
    if not leaves or not groups:
        return []
    names = [name for _, name in leaves]
    wide: set[str] = set()
    with pq.ParquetFile(path, pre_buffer=False, read_dictionary=names) as probe:
        for number in groups:
            group = file.metadata.row_group(number)
            first = next(probe.iter_batches(1, [number], columns=used, use_threads=False), None)
            longest = 0 if first is None else max(map(_longest, first.columns), default=0)
            for index, name in leaves:
                column = group.column(index)
                room = max(sniff.FREE_BYTES, ROOMY * column.total_compressed_size)
                if column.num_values * longest > room:
                    wide.add(name)
    return sorted(wide)


def _longest(column: pa.Array) -> int:
    """Bytes of the longest text in a dictionary of `column`."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return int(pc.max(_lengths(column.dictionary)).as_py() or 0)
    if pa.types.is_struct(kind):
        return max(map(_longest, column.flatten()), default=0)
    if any(is_list(kind) for is_list in _LISTS):
        return _longest(column.values)
    return 0
