"""The step "tokenise": files -> rows of token ids with their trained ranges."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning import files
from tuning.data import parallel, sniff
from tuning.data.encode import Encoder
from tuning.data.formats import Shape
from tuning.data.meter import Meter
from tuning.data.parts import PART, divide
from tuning.data.problems import Problems
from tuning.data.reader import Input, Known, Reader, reader_of, writing
from tuning.data.sample import spelled
from tuning.data.tally import Tally
from tuning.errors import DataError

MOST_PROCESSES = 16  # each takes some 150 MB


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out the request; see the package's docstring. Raises DataError or SpecError."""
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.arrow", "preview.json", "tokenised.json"):
        (out / name).unlink(missing_ok=True)
    for left in out.glob(".parts-*"):  # by a run that was killed
        shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(prefix=".parts-", dir=out))
    try:
        return _Step(request, out, scratch).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _Read:
    """One file, read."""

    input: Input
    tally: Tally
    shape: Shape | None


class _Step:
    """One run of the step."""

    def __init__(self, request: dict[str, Any], out: Path, scratch: Path) -> None:
        self.request, self.out, self.scratch = request, out, scratch
        size = sum(Path(file["path"]).stat().st_size for file in request["files"])
        self.meter = Meter(out / "progress", size)
        self.reader, self.tokenizer = reader_of(request, scratch=scratch, meter=self.meter)

    def run(self) -> dict[str, Any]:
        """Read everything, then answer."""
        inputs = self._inputs()
        rows = self.scratch / "rows.arrow"
        with writing(rows) as writer:
            read = self._read(inputs, writer)
        self.reader.problems.raise_all()
        if not self.reader.tally.rows:
            raise self._nothing_trained()
        files.sync_file(rows)
        rows.replace(self.out / "rows.arrow")
        files.sync_folder(self.out)
        files.write_json(self.out / "preview.json", self._preview())
        result = self._result(read)
        files.write_json(self.out / "tokenised.json", result)
        return result

    def _inputs(self) -> list[Input]:
        """The files, each recognised; what cannot be used is noted."""
        inputs = []
        extension = self.request["settings"].get("dataset_extension")
        for number, file in enumerate(self.request["files"]):
            path, shown = Path(file["path"]), str(file["shown"])
            try:
                inputs.append(Input(number, path, shown, sniff.sniff(path, shown, extension)))
            except DataError as error:
                self.reader.problems.extend(error.problems)
        return inputs

    def _read(self, inputs: Sequence[Input], writer: Any) -> list[_Read]:
        about = self.request.get("part_bytes") or PART
        work = [(i, part) for i in inputs for part in divide(i.path, i.kind, about=about)]
        processes = self.request.get("processes") or len(os.sched_getaffinity(0))
        processes = min(processes, len(work), MOST_PROCESSES)
        large = sum(part.size for _, part in work) >= 2 * about
        known = self._look(inputs) if processes > 1 and large else None
        if known is None:
            return [_Read(input, *self.reader.take(input, writer)) for input in inputs]
        tallies = parallel.read(
            self.request,
            work,
            known,
            reader=self.reader,
            writer=writer,
            meter=self.meter,
            processes=processes,
        )
        return [_Read(input, tallies[input.number], known[input.number].shape) for input in inputs]

    def _look(self, inputs: Sequence[Input]) -> dict[int, Known] | None:
        """What each file is, from its first rows, so that its parts can be read side by side.

        None where one of them shows a problem at once: then all are read in order.
        """
        looking = Reader(self.reader.encoder, self.reader.columns, Problems(), self.scratch)
        known: dict[int, Known] = {}
        for input in inputs:
            try:
                batch = looking.first_batch(input)
                shape = looking.judge(input.shown, batch) if batch else None
            except DataError:
                return None
            if batch is None or shape is None or looking.first is None:
                return None
            looking.decide(input, shape, batch)
            known[input.number] = Known(shape, looking.first.began)
        self.reader.first = looking.first
        return known

    def _nothing_trained(self) -> DataError:
        return DataError.at(
            "DATA-230",
            "data",
            f"none of the {sum(self.reader.tally.dropped.values())} rows has a token to learn",
            "check the labels, or the columns that hold the answers",
        )

    def _preview(self) -> list[dict[str, Any]]:
        """The first rows, token by token, each token with whether it is trained."""
        return [
            {"where": where, "tokens": spelled(self.tokenizer, encoded)}
            for where, encoded in self.reader.tally.samples
        ]

    def _result(self, read: Sequence[_Read]) -> dict[str, Any]:
        """The answer to the request."""
        tally, first = self.reader.tally, self.reader.first
        assert first is not None
        noted = Counter(tally.notes)
        noted.update(self.reader.encoder.notes)
        notes = [f"{text} ({n} rows)" if n else text for text, n in sorted(noted.items())]
        notes += [f"{n} rows left out: {why}" for why, n in sorted(tally.dropped.items())]
        rows_per_file: Counter[str] = Counter()
        for file in read:
            rows_per_file[file.input.shown] += file.tally.rows
        return {
            "rows": tally.rows,
            "rows_per_file": dict(rows_per_file),
            "files": [_file(file) for file in read],
            "shape": {"name": first.shape.name, "reason": first.shape.reason},
            "rendering": _rendering(first.shape, self.reader.encoder),
            "tokens": tally.tokens,
            "trained_tokens": tally.trained,
            "lengths": tally.spread(),
            "dropped": dict(tally.dropped),
            "notes": notes,
            "bos": self.tokenizer.bos_token_id,
        }


def _file(read: _Read) -> dict[str, Any]:
    kind, shape = read.input.kind, read.shape
    return {
        "shown": read.input.shown,
        "format": kind.format,
        "compression": kind.compression,
        "rows": read.tally.rows,
        "shape": shape.name if shape else None,
        "reason": shape.reason if shape else None,
    }


def _rendering(shape: Shape, encoder: Encoder) -> str:
    if shape.name in ("messages", "sharegpt"):
        return "conversations through the chat template"
    if shape.name in ("text", "tokens"):
        return "all tokens as they are"
    if encoder.pairs_are_chats:
        return "pairs as a user turn and an assistant turn through the chat template"
    return "pairs as running text: the prompt, then the completion"
