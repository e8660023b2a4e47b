"""The step "tokenise": files -> rows of token ids with their trained ranges."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tuning import files
from tuning.data import mixture, parallel, parts, sniff
from tuning.data.encode import Encoded, Encoder
from tuning.data.file_encoder import FileEncoder, Input, KnownShape, from_request, open_writer
from tuning.data.formats import Objective, Shape, objective_of, quoted
from tuning.data.preview import preview_tokens
from tuning.data.problems import Problems
from tuning.data.read_progress import ReadProgress
from tuning.data.statistics import MAX_SAMPLES, Statistics
from tuning.errors import DataError

MAX_PROCESSES = 16  # each takes some 150 MB


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run the request; see the package's docstring. Raises DataError or SpecError."""
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.arrow", "preview.json", "tokenised.json"):
        (out / name).unlink(missing_ok=True)
    for leftover in out.glob(".parts-*"):  # of a killed run
        shutil.rmtree(leftover)
    scratch = Path(tempfile.mkdtemp(prefix=".parts-", dir=out))
    try:
        return _Tokenisation(request, out, scratch).run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _EncodedFile:
    input: Input
    statistics: Statistics
    shape: Shape | None

    def to_json(self) -> dict[str, Any]:
        """For the result."""
        return {
            "shown": self.input.shown,
            "format": self.input.kind.format,
            "compression": self.input.kind.compression,
            "rows": self.statistics.rows,
            "shape": self.shape.name if self.shape else None,
            "reason": self.shape.reason if self.shape else None,
            "part": self.input.part,
        }


class _Tokenisation:
    """One run of the step."""

    def __init__(self, request: dict[str, Any], out: Path, scratch: Path) -> None:
        self.request, self.out, self.scratch = request, out, scratch
        size = sum(Path(file["path"]).stat().st_size for file in request["files"])
        self.progress = ReadProgress(out / "progress", size)
        self.file_encoder, self.tokenizer = from_request(
            request, scratch=scratch, progress=self.progress
        )

    def run(self) -> dict[str, Any]:
        """Encode all files; returns the result."""
        inputs = self._drawn(self._inputs())
        rows = self.scratch / "rows.arrow"
        with open_writer(rows) as writer:
            encoded = self._encode(inputs, writer)
        self.file_encoder.problems.raise_all()
        statistics = self.file_encoder.statistics
        if not statistics.rows:
            raise DataError.at(
                "DATA-230",
                "data",
                f"none of the {sum(statistics.dropped.values())} rows has a token to learn",
                "check the labels, or the columns that hold the answers",
            )
        files.sync_file(rows)
        rows.replace(self.out / "rows.arrow")
        files.sync_folder(self.out)
        preview = [
            {"where": place, "tokens": preview_tokens(self.tokenizer, row)}
            for place, row in _samples(encoded)
        ]
        files.write_json(self.out / "preview.json", preview)
        result = self._result(encoded)
        files.write_json(self.out / "tokenised.json", result)
        return result

    def _inputs(self) -> list[Input]:
        """The files with their types; adds a problem for each that cannot be used."""
        inputs = []
        extension = self.request["settings"].get("dataset_extension")
        for number, file in enumerate(self.request["files"]):
            path, shown = Path(file["path"]), str(file["shown"])
            try:
                kind = sniff.sniff(path, shown, extension)
                inputs.append(Input(number, path, shown, kind, file.get("part") or 0))
            except DataError as error:
                self.file_encoder.problems.extend(error.problems)
        return inputs

    def _drawn(self, inputs: list[Input]) -> list[Input]:
        """The files of a mixture with the rows of each that are trained on."""
        parts = self.request.get("sources")
        if not parts:
            return inputs
        return mixture.draw(inputs, parts, self.file_encoder, seed=self.request["seed"])

    def _encode(self, inputs: Sequence[Input], writer: Any) -> list[_EncodedFile]:
        part_bytes = self.request.get("part_bytes") or parts.PART_BYTES
        input_parts = [
            (input, part)
            for input in inputs
            for part in parts.split(input.path, input.kind, part_bytes=part_bytes)
        ]
        processes = self.request.get("processes") or len(os.sched_getaffinity(0))
        processes = min(processes, len(input_parts), MAX_PROCESSES)
        is_large = sum(part.size for _, part in input_parts) >= 2 * part_bytes
        shapes = self._detect_shapes(inputs) if processes > 1 and is_large else None
        if shapes is None:
            return [_EncodedFile(each, *self.file_encoder.encode(each, writer)) for each in inputs]
        statistics = parallel.encode(
            self.request,
            input_parts,
            shapes,
            file_encoder=self.file_encoder,
            writer=writer,
            progress=self.progress,
            processes=processes,
        )
        return [
            _EncodedFile(each, statistics[each.number], shapes[each.number].shape)
            for each in inputs
        ]

    def _detect_shapes(self, inputs: Sequence[Input]) -> dict[int, KnownShape] | None:
        """The shape of each file by its first row, so that its parts can be read in parallel.

        None if a first row has a problem: then all files are read in order.
        """
        detector = FileEncoder(
            self.file_encoder.encoder, self.file_encoder.columns, Problems(), self.scratch
        )
        shapes: dict[int, KnownShape] = {}
        for input in inputs:
            try:
                batch = detector.first_batch(input)
                shape = detector.detect_shape(input, batch) if batch else None
            except DataError:
                return None
            if batch is None or shape is None:
                return None
            detector.decide_pairs(input, shape, batch)
            shapes[input.number] = KnownShape(shape, detector.first[input.part].place)
        self.file_encoder.first = detector.first
        self.file_encoder.raw_pairs = detector.raw_pairs
        return shapes

    def _result(self, encoded: Sequence[_EncodedFile]) -> dict[str, Any]:
        statistics = self.file_encoder.statistics
        first = self.file_encoder.first[min(self.file_encoder.first)]
        counted = Counter(statistics.notes)
        counted.update(self.file_encoder.encoder.notes)
        notes = [f"{text} ({n} rows)" if n else text for text, n in sorted(counted.items())]
        if unread := list(statistics.unread.items()):
            columns = ", ".join(f"{quoted(name)} ({n} rows)" for name, n in unread[:12])
            notes.append(f"not read: the columns {columns}")
        notes += [f"{n} rows left out: {why}" for why, n in sorted(statistics.dropped.items())]
        rows_per_file: Counter[str] = Counter()
        for file in encoded:
            rows_per_file[file.input.shown] += file.statistics.rows
        return {
            "objective": self._objective(min(self.file_encoder.first)),
            "documents": statistics.lengths.total(),
            "rows": statistics.rows,
            "rows_per_file": dict(rows_per_file),
            "files": [file.to_json() for file in encoded],
            "shape": {"name": first.shape.name, "reason": first.shape.reason},
            "rendering": self._rendering(min(self.file_encoder.first)),
            **({"sources": self._sources(encoded)} if self.request.get("sources") else {}),
            "tokens": statistics.tokens,
            "trained_tokens": statistics.trained,
            "lengths": statistics.length_distribution(),
            "dropped": dict(statistics.dropped),
            "notes": notes,
            "bos": self.tokenizer.bos_token_id,
        }

    def _sources(self, encoded: Sequence[_EncodedFile]) -> list[dict[str, Any]]:
        """Shape and counts of each part of a mixture."""
        sources = []
        for number, part in enumerate(self.request["sources"]):
            files_ = [file.statistics for file in encoded if file.input.part == number]
            counts = {name: sum(getattr(f, name) for f in files_) for name in ("rows", "tokens")}
            shape = self.file_encoder.first[number].shape
            sources.append(
                {
                    "path": part["path"],
                    "shape": {"name": shape.name, "reason": shape.reason},
                    "rendering": self._rendering(number),
                    **counts,
                    "trained_tokens": sum(each.trained for each in files_),
                }
            )
        return sources

    def _rendering(self, part: int) -> str:
        shape = self.file_encoder.first[part].shape
        self.file_encoder.encoder.raw_pairs = self.file_encoder.raw_pairs.get(part)
        return _rendering(shape, self.file_encoder.encoder, self._objective(part))

    def _objective(self, part: int) -> Objective:
        shape = self.file_encoder.first[part].shape
        return objective_of(shape, self.file_encoder.columns[part].objective)


def _samples(encoded: Sequence[_EncodedFile]) -> list[tuple[str, Encoded]]:
    """The first rows; of a mixture those of its parts in turn."""
    parts: dict[int, list[tuple[str, Encoded]]] = {}
    for file in encoded:
        parts.setdefault(file.input.part, []).extend(file.statistics.samples)
    turns = zip_longest(*parts.values())
    return [row for turn in turns for row in turn if row is not None][:MAX_SAMPLES]


def _rendering(shape: Shape, encoder: Encoder, objective: Objective) -> str:
    if objective == "dpo":
        return "pairs of answers: the chosen one is to become likelier than the rejected one"
    if objective == "kto":
        return "rated answers: good ones are to become likelier, bad ones less likely"
    if shape.name in ("messages", "sharegpt"):
        return "conversations through the chat template"
    if shape.name in ("text", "tokens"):
        return "all tokens as they are"
    if encoder.pairs_are_chats:
        return "pairs as a user turn and an assistant turn through the chat template"
    return "pairs as running text: the prompt, then the completion"
