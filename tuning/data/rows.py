"""The tokenised rows, memory-mapped, and training rows gathered from them.

All of it is vectorised: a training row may consist of a hundred short documents from anywhere in
the file, and a Python loop over them would take longer than tokenising them.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

IGNORED = -100
SCHEMA = pa.schema(
    [(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "seq_lengths")]
)
PIECE = np.dtype(
    [("row", "i4"), ("start", "i4"), ("end", "i4"), ("lead", "i4"), ("clip", "?")]
)  # over_length.Piece
Ints = np.ndarray[Any, np.dtype[np.int32]]
Wide = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class _Lists:
    """A list column in a file of int32: where the buffers of each record batch begin."""

    ends: Wide  # offsets of the lists in the values
    values: Wide

    def find(self, file: Ints, batch: Wide, at: Wide) -> tuple[Wide, Wide]:
        """Where the lists `at` of the batches `batch` begin in `file`, and their lengths."""
        first, last = file[self.ends[batch] + at], file[self.ends[batch] + at + 1]
        return self.values[batch] + first, (last - first).astype(np.int64)


class Rows:
    """The file `rows.arrow`; rows are accessed by number."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = pa.py_buffer(self._map)
        self._file: Ints = np.frombuffer(self._map, dtype=np.int32, count=len(self._map) // 4)
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ids = _lists_of(batches, 0, buffer.address)
        self._ranges = _lists_of(batches, 1, buffer.address)
        self._places = [(b.column(2).to_numpy(), b.column(3).to_numpy()) for b in batches]
        self._starts: Wide = np.cumsum([0, *(batch.num_rows for batch in batches)])
        lengths = [np.diff(batch.column(0).offsets.to_numpy()) for batch in batches]
        self.lengths: Ints = np.concatenate(lengths)

    @property
    def files(self) -> Ints:
        """The number of the source file of each row."""
        return np.concatenate([files for files, _ in self._places])

    def release(self) -> None:
        """Release the memory of the rows read so far; the file stays mapped."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def get(self, row: int) -> tuple[Ints, Ints]:
        """Ids and flat trained ranges of one row."""
        batch, at = self._find(np.array([row]))
        (begin,), (length,) = self._ids.find(self._file, batch, at)
        (first,), (count,) = self._ranges.find(self._file, batch, at)
        return self._file[begin : begin + length], self._file[first : first + count]

    def place(self, row: int) -> tuple[int, int]:
        """The number of the source file of `row`, and the line or row in it."""
        (batch,), (at,) = self._find(np.array([row]))
        files, places = self._places[batch]
        return int(files[at]), int(places[at])

    def _find(self, rows: Any) -> tuple[Wide, Wide]:
        batch = np.searchsorted(self._starts, rows, side="right") - 1
        return batch, rows - self._starts[batch]

    def gather(self, pieces: Any, counts: Wide) -> tuple[pa.RecordBatch, int]:
        """Training rows (SCHEMA) of `counts` pieces each, and their number of trained tokens.

        `pieces` is an array of PIECE. The first token of a piece has no label, because no token
        before it predicts it.
        """
        batch, at = self._find(pieces["row"].astype(np.int64))
        begin, _ = self._ids.find(self._file, batch, at)
        start, end = pieces["start"].astype(np.int64), pieces["end"].astype(np.int64)
        lead = pieces["lead"].astype(np.int64)
        sizes = lead + end - start
        first = np.concatenate(([0], np.cumsum(sizes)[:-1]))  # index of each piece's first token
        index = ramps(begin + start - lead, sizes)
        has_lead = lead > 0
        index[first[has_lead]] = begin[has_lead]
        ids = self._file[index]
        trained = np.zeros(len(ids), dtype=bool)
        trained[self._trained(pieces, batch, at, first - start + lead)] = True
        trained[first] = False
        labels = np.where(trained, ids, np.int32(IGNORED))
        documents = np.cumsum(counts)
        tokens = np.cumsum(sizes)[documents - 1]
        columns = [
            lists(ids, tokens),
            lists(labels, tokens),
            lists(sizes.astype(np.int32), documents),
        ]
        return pa.record_batch(columns, schema=SCHEMA), int(trained.sum())

    def _trained(self, pieces: Any, batch: Wide, at: Wide, shift: Wide) -> Wide:
        """The indices of gathered tokens in trained ranges; `shift` is the offset of each piece.

        A range that begins before its piece is clipped if the piece says so, else left out.
        """
        first, count = self._ranges.find(self._file, batch, at)
        bounds = self._file[ramps(first, count)].astype(np.int64)
        piece = np.repeat(np.arange(len(pieces)), count // 2)
        begins, ends = bounds[::2], bounds[1::2]
        low, high = pieces["start"][piece], pieces["end"][piece]
        kept = (begins >= low) | pieces["clip"][piece]
        begins, ends = np.maximum(begins, low), np.minimum(ends, high)
        kept &= begins < ends
        return ramps((begins + shift[piece])[kept], (ends - begins)[kept])


def _lists_of(batches: list[pa.RecordBatch], column: int, base: int) -> _Lists:
    """Where the lists of `column` are, counted in int32 from the address `base`."""
    ends, values = [], []
    for batch in batches:
        _, offsets, *_ = batch.column(column).buffers()
        content = batch.column(column).values.buffers()[1]
        ends.append((offsets.address - base) // 4)
        values.append((content.address - base) // 4 if content is not None else 0)
    return _Lists(np.array(ends, dtype=np.int64), np.array(values, dtype=np.int64))


def ramps(starts: Wide, sizes: Wide) -> Wide:
    """The ranges [start, start + size), concatenated."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    ranges: Wide = np.arange(total) + np.repeat(starts - (ends - sizes), sizes)
    return ranges


def lists(values: Ints, ends: Any) -> pa.ListArray:
    """Arrow lists of int32 that end at `ends` of `values`."""
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
