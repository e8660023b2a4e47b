"""Files, or parts of them -> encoded rows in an Arrow file, with statistics and problems."""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
    Objective,
    Plain,
    Shape,
    detect,
    documents,
    example_of,
    left_out,
    objective_of,
    unused,
)
from tuning.data.formats.preferences import SAME, SIDES
from tuning.data.parts import Part
from tuning.data.problems import Problems, mixed_shapes
from tuning.data.read_progress import ReadProgress
from tuning.data.source import Batch, Source
from tuning.data.statistics import Statistics
from tuning.data.tokenizer import load_template, load_tokenizer
from tuning.data.vocabulary import embedding_rows
from tuning.errors import DataError
from tuning.spec.mixture import COLUMNS

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int32())),
        ("file", pa.int32()),
        ("place", pa.int64()),
        ("good", pa.bool_()),  # of an answer that is rated; else true
    ]
)  # a pair is two rows: the chosen answer, then the rejected one


@dataclass(frozen=True)
class Input:
    """One file of the request."""

    number: int
    path: Path
    shown: str
    kind: sniff.FileType
    part: int = 0  # of a mixture
    chosen: str | None = None  # a file of the places of its rows to train on; None: all


@dataclass(frozen=True)
class KnownShape:
    """The shape of a file's rows, and the place where it was detected."""

    shape: Shape
    place: str


@dataclass
class FileEncoder:
    """Reads files or parts of them, in order, and writes their encoded rows."""

    encoder: Encoder
    columns: Sequence[Columns]  # of each part of a mixture, or of all data
    problems: Problems
    scratch: Path
    tick: Callable[[int], None] = lambda size: None  # called with the bytes read since the last
    first: dict[int, KnownShape] = field(default_factory=dict)  # of each part
    raw_pairs: dict[int, bool | None] = field(default_factory=dict)  # Encoder's, of each part
    statistics: Statistics = field(default_factory=Statistics)

    def encode(
        self,
        input: Input,
        writer: Any,
        *,
        part: Part | None = None,
        known: KnownShape | None = None,
    ) -> tuple[Statistics, Shape | None]:
        """Write the rows of `input`, or of a part of it; returns their statistics and shape.

        `known` is the shape that another process detected; otherwise the first row decides.
        """
        problems_before, statistics = len(self.problems), Statistics()
        shape = known.shape if known else None
        if known:
            self.first[input.part] = known
        self.encoder.raw_pairs = self.raw_pairs.get(input.part)
        chosen = None if input.chosen is None else np.load(input.chosen)
        for batch in read.batches(self._source(input, part)):
            if shape is None:
                shape = self.detect_shape(input, batch)
            statistics.seen += len(batch.rows)
            if shape is None:
                break
            statistics.notes.update(dict.fromkeys(batch.notes, 0))
            self._write(input, shape, _only(batch, chosen), writer, statistics)
        self.raw_pairs[input.part] = self.encoder.raw_pairs
        if not statistics.seen and not part and len(self.problems) == problems_before:
            self.add_empty(input.shown)
        self.statistics.add(statistics)
        return statistics, shape

    def add_empty(self, shown: str) -> None:
        """Add the problem that a file is empty."""
        self.problems.add("DATA-201", shown, "holds no rows", "give a file with rows")

    def first_batch(self, input: Input) -> Batch | None:
        """The first readable rows of a file."""
        return next(read.batches(self._source(input, None)), None)

    def detect_shape(self, input: Input, batch: Batch) -> Shape | None:
        """The shape of a file by its first row; None, and a problem, if it cannot be used.

        All files of a part of a mixture, or of all data, have one shape.
        """
        where = f"{input.shown} {batch.unit} {batch.places[0]}"
        try:
            shape = detect(batch.rows[0], self.columns[input.part])
        except BadRow as bad:
            self._add_faults(bad.faults, where, input.part)
            return None
        first = self.first.setdefault(input.part, KnownShape(shape, where))
        if shape.name != first.shape.name:
            self.problems.extend([mixed_shapes(where, shape, first.place, first.shape)])
            return None
        objective = self._objective(shape, input.part)
        for part, other in self.first.items():
            if self._objective(other.shape, part) != objective:
                self.problems.extend([mixed_shapes(where, shape, other.place, other.shape)])
                return None
        return shape

    def _source(self, input: Input, part: Part | None) -> Source:
        return Source(
            input.path,
            input.shown,
            input.kind,
            self.problems,
            self.scratch,
            self.columns[input.part].named,
            part or Part(size=input.path.stat().st_size),
            self.tick,
        )

    def _add_faults(self, faults: Iterable[Fault], where: str, part: int) -> None:
        for fault in faults:
            what = fault.what
            if fault.code == "DATA-214" and part in self.first:
                what += f" ({self.first[part].place})"
            self.problems.add(fault.code, where, what, fault.change)

    def _write(
        self, input: Input, shape: Shape, batch: Batch, writer: Any, statistics: Statistics
    ) -> None:
        places, examples = self._examples(input, shape, batch, statistics)
        kept: list[Encoded] = []
        kept_places: list[int] = []
        good: list[bool] = []
        objective = self._objective(shape, input.part)
        rows = self._documents(places, examples, objective, statistics)
        encoded = iter(self.encoder.encode([each for _, answers, _ in rows for each in answers]))
        for place, answers, is_good in rows:
            made = [next(encoded) for _ in answers]
            where = f"{input.shown} {batch.unit} {place}"
            if faults := [each for each in made if isinstance(each, Fault)]:
                if faults[0].code == "DATA-244":  # the same for every row
                    raise DataError.at(faults[0].code, where, faults[0].what, faults[0].change)
                self._add_faults(dict.fromkeys(faults), where, input.part)
                continue
            sides = [each for each in made if isinstance(each, Encoded)]
            if any(not each.trained or each.trained[-1] < 2 for each in sides):
                statistics.dropped["no token to learn"] += 1
            elif len(sides) > 1 and sides[0].ids == sides[1].ids:
                self._add_faults([SAME], where, input.part)
            else:
                kept += sides
                kept_places += [place] * len(sides)
                good += [is_good] * len(sides)
        if kept:
            columns = [
                int_lists([row.ids for row in kept]),
                int_lists([row.trained for row in kept]),
                pa.array(np.full(len(kept), input.number, dtype=np.int32)),
                pa.array(np.array(kept_places, dtype=np.int64)),
                pa.array(good),
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            names = [f"{batch.unit} {place}" for place in kept_places]
            if objective == "dpo":
                names = [f"{n}, {SIDES[side % 2]}" for side, n in enumerate(names)]
            elif objective == "kto":
                names = [f"{n}, {'good' if g else 'bad'}" for n, g in zip(names, good, strict=True)]
            width = 2 if objective == "dpo" else 1
            statistics.count(kept, lambda n: f"{input.shown} {names[n]}", width=width)

    def _documents(
        self,
        places: Sequence[int],
        examples: Sequence[Example],
        objective: Objective,
        statistics: Statistics,
    ) -> list[tuple[int, list[Plain], bool]]:
        """The place of each training row, its documents, and whether they are good."""
        rows = []
        for place, example in zip(places, examples, strict=True):
            made = documents(example, objective)
            rows += [(place, answers, good) for answers, good in made]
            if not made:
                statistics.dropped["rated bad, and objective is sft"] += 1
        return rows

    def _examples(
        self, input: Input, shape: Shape, batch: Batch, statistics: Statistics
    ) -> tuple[list[int], list[Example]]:
        places: list[int] = []
        examples: list[Example] = []
        for place, row in zip(batch.places, batch.rows, strict=True):
            try:
                example = example_of(row, shape, self.columns[input.part])
                statistics.unread.update(unused(row, shape))
            except BadRow as bad:
                self._add_faults(bad.faults, f"{input.shown} {batch.unit} {place}", input.part)
                continue
            if why := left_out(row, shape):
                statistics.dropped[why] += 1
            else:
                examples.append(example)
                places.append(place)
        return places, examples

    def decide_pairs(self, input: Input, shape: Shape, batch: Batch) -> None:
        """Decide by these rows how pairs of their part are rendered; adds no problems."""
        silent = FileEncoder(self.encoder, self.columns, Problems(), self.scratch, first=self.first)
        self.encoder.raw_pairs = self.raw_pairs.get(input.part)
        _, examples = silent._examples(input, shape, batch, Statistics())
        rows = [row for example in examples for row in documents(example, "kto")]  # bad ones, too
        self.encoder.decide_pairs([each for answers, _ in rows for each in answers])
        self.raw_pairs[input.part] = self.encoder.raw_pairs

    def _objective(self, shape: Shape, part: int) -> Objective:
        return objective_of(shape, self.columns[part].objective)


def _only(batch: Batch, chosen: Any) -> Batch:
    """The rows of `batch` whose places are among `chosen`, sorted; None: all."""
    if chosen is None:
        return batch
    at = np.searchsorted(chosen, batch.places)
    kept = [
        number
        for number, (place, index) in enumerate(zip(batch.places, at, strict=True))
        if index < len(chosen) and chosen[index] == place
    ]
    return replace(
        batch, places=[batch.places[n] for n in kept], rows=[batch.rows[n] for n in kept]
    )


@contextlib.contextmanager
def open_writer(path: Path) -> Iterator[Any]:
    """A writer of encoded rows to a new file, with fewer runs of the garbage collector.

    Rows are many small objects without cycles; scanning them again and again would take an eighth
    of the time.
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


def int_lists(values: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of integers as Arrow lists of int32."""
    ends = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=ends[1:])
    flat = array("i")
    for value in values:
        flat.extend(value)
    return pa.ListArray.from_arrays(
        pa.array(ends), pa.array(np.frombuffer(flat, dtype=np.int32) if flat else [], pa.int32())
    )


def from_request(
    request: dict[str, Any], *, scratch: Path, progress: ReadProgress
) -> tuple[FileEncoder, Any]:
    """A file encoder with the settings of `request`, and the tokenizer. Raises SpecError."""
    settings, base = request["settings"], Path(request["base"])
    new_tokens = settings.get("new_tokens") or ()
    tokenizer = load_tokenizer(base, new_tokens, settings.get("chat_template"))
    template = load_template(tokenizer, settings.get("chat_template"))
    encoder = Encoder(
        tokenizer,
        template,
        train_on=settings.get("train_on") or "assistant",
        embedding_rows=embedding_rows(base),
        new_tokens=len(new_tokens),
    )
    names = (*COLUMNS, "objective")
    columns = [
        Columns(*(part.get(name) or settings.get(name) for name in names))
        for part in request.get("sources") or [{}]
    ]
    return FileEncoder(encoder, columns, Problems(), scratch, progress.add), tokenizer
