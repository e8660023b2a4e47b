"""Files, or parts of them -> encoded rows in an Arrow file, a tally, and what is wrong."""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tuning.data import read, sniff
from tuning.data.encode import Encoded, Encoder
from tuning.data.formats import (
    BadRow,
    Columns,
    Example,
    Fault,
    Shape,
    detect,
    quoted,
    to_example,
    unused,
)
from tuning.data.meter import Meter
from tuning.data.parts import Part
from tuning.data.problems import Problems, mixed
from tuning.data.source import Batch, Source
from tuning.data.tally import Tally
from tuning.data.tokenizer import load_template, load_tokenizer
from tuning.errors import DataError

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int32())),
        ("file", pa.int32()),
        ("place", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Input:
    """One file of the request."""

    number: int
    path: Path
    shown: str
    kind: sniff.Kind


@dataclass(frozen=True)
class Known:
    """What the rows of a file are, and where that was first seen."""

    shape: Shape
    began: str


@dataclass
class Reader:
    """Reads files or parts of them, in order, and writes their rows."""

    encoder: Encoder
    columns: Columns
    problems: Problems
    scratch: Path
    tick: Callable[[int], None] = lambda size: None  # told the bytes read since the last time
    first: Known | None = None  # of all files
    tally: Tally = field(default_factory=Tally)

    def take(
        self, input: Input, writer: Any, *, part: Part | None = None, known: Known | None = None
    ) -> tuple[Tally, Shape | None]:
        """Write the rows of `input`, or of a part of it; gives its own tally and its shape.

        `known` is what another process found the file to be; otherwise its first row decides.
        """
        before, mine = len(self.problems), Tally()
        shape = known.shape if known else None
        if known:
            self.first = known
        source = self._source(input, part)
        for batch in read.batches(source):
            if shape is None:
                shape = self.judge(input.shown, batch)
            mine.seen += len(batch.rows)
            if shape is None:
                break
            self._write(input, shape, batch, writer, mine)
        if not mine.seen and not part and len(self.problems) == before:
            self.empty(input.shown)
        self.tally.add(mine)
        return mine, shape

    def empty(self, shown: str) -> None:
        """Note that a file holds nothing."""
        self.problems.add("DATA-201", shown, "holds no rows", "give a file with rows")

    def first_batch(self, input: Input) -> Batch | None:
        """The first rows of a file that can be read."""
        return next(read.batches(self._source(input, None)), None)

    def judge(self, shown: str, batch: Batch) -> Shape | None:
        """The shape of a file, from its first row; None, and a problem, if it cannot be used."""
        where = f"{shown} {batch.unit} {batch.places[0]}"
        try:
            shape = detect(batch.rows[0], self.columns)
        except BadRow as bad:
            self._note(bad.faults, where)
            return None
        if self.first is None:
            self.first = Known(shape, where)
        elif shape.name != self.first.shape.name:
            self.problems.extend([mixed(where, shape, self.first.began, self.first.shape)])
            return None
        if left := unused(batch.rows[0], shape):
            self.tally.notes[f"not read: the columns {', '.join(map(quoted, left[:12]))}"] += 0
        return shape

    def _source(self, input: Input, part: Part | None) -> Source:
        named = (self.columns.messages, self.columns.context, self.columns.response)
        wanted = frozenset(name for name in named if name)
        return Source(
            input.path,
            input.shown,
            input.kind,
            self.problems,
            self.scratch,
            wanted,
            part or Part(size=input.path.stat().st_size),
            self.tick,
        )

    def _note(self, faults: Sequence[Fault], where: str) -> None:
        for fault in faults:
            what = fault.what
            if fault.code == "DATA-214" and self.first:
                what += f" ({self.first.began})"
            self.problems.add(fault.code, where, what, fault.change)

    def _write(self, input: Input, shape: Shape, batch: Batch, writer: Any, tally: Tally) -> None:
        places, examples = self._examples(input.shown, shape, batch)
        kept: list[Encoded] = []
        kept_places: list[int] = []
        for place, encoded in zip(places, self.encoder.encode(examples), strict=True):
            if isinstance(encoded, Fault):
                where = f"{input.shown} {batch.unit} {place}"
                if encoded.code == "DATA-244":  # true of every row alike
                    raise DataError.at(encoded.code, where, encoded.what, encoded.change)
                self._note([encoded], where)
            elif not encoded.trained or encoded.trained[-1] < 2:
                tally.dropped["no token to learn"] += 1
            else:
                kept.append(encoded)
                kept_places.append(place)
        if kept:
            writer.write_batch(_record(kept, kept_places, input.number))
            tally.keep(kept, lambda n: f"{input.shown} {batch.unit} {kept_places[n]}")

    def _examples(self, shown: str, shape: Shape, batch: Batch) -> tuple[list[int], list[Example]]:
        places: list[int] = []
        examples: list[Example] = []
        for place, row in zip(batch.places, batch.rows, strict=True):
            try:
                examples.append(to_example(row, shape))
                places.append(place)
            except BadRow as bad:
                self._note(bad.faults, f"{shown} {batch.unit} {place}")
        return places, examples

    def decide(self, input: Input, shape: Shape, batch: Batch) -> None:
        """Let the encoder see what it decides from the first rows."""
        silent = Reader(self.encoder, self.columns, Problems(), self.scratch, first=self.first)
        self.encoder.decide(silent._examples(input.shown, shape, batch)[1])


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Any]:
    """A writer of rows for the new file at `path`, with the cycle collector told to look rarely.

    Rows are many small objects, and none point back: without that the collector walks them again
    and again, for an eighth of the time.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            yield writer
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _record(rows: Sequence[Encoded], places: Sequence[int], number: int) -> pa.RecordBatch:
    return pa.record_batch(
        [
            lists([row.ids for row in rows]),
            lists([row.trained for row in rows]),
            pa.array(np.full(len(rows), number, dtype=np.int32)),
            pa.array(np.array(places, dtype=np.int64)),
        ],
        schema=SCHEMA,
    )


def lists(values: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of whole numbers as Arrow lists of int32."""
    ends = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=ends[1:])
    flat = array("i")
    for value in values:
        flat.extend(value)
    return pa.ListArray.from_arrays(
        pa.array(ends), pa.array(np.frombuffer(flat, dtype=np.int32) if flat else [], pa.int32())
    )


def reader_of(request: dict[str, Any], *, scratch: Path, meter: Meter) -> tuple[Reader, Any]:
    """What reads files as `request` says, and the tokenizer. Raises SpecError."""
    settings = request["settings"]
    tokenizer = load_tokenizer(Path(request["base"]))
    template = load_template(tokenizer, settings.get("chat_template"))
    encoder = Encoder(tokenizer, template, train_on=settings.get("train_on") or "assistant")
    columns = Columns(
        settings.get("messages_column"),
        settings.get("context_column"),
        settings.get("response_column"),
    )
    return Reader(encoder, columns, Problems(), scratch, meter.add), tokenizer
