"""Encodes parts of files in parallel processes; rows keep their order.

Each process is `python -m tuning.process data REQUEST` with the step "part". It writes the rows of
each of its parts to an Arrow file; the parent concatenates them. The result does not depend on the
number of processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from tuning import process
from tuning.data import read_progress
from tuning.data.file_encoder import FileEncoder, Input, KnownShape, from_request, open_writer
from tuning.data.formats import Shape
from tuning.data.parts import Part
from tuning.data.problems import Problems
from tuning.data.read_progress import ReadProgress
from tuning.data.sniff import FileType
from tuning.data.statistics import Statistics
from tuning.errors import Problem, TuningError
from tuning.threads import side_by_side

InputPart = tuple[Input, Part]


def encode(
    request: dict[str, Any],
    parts: Sequence[InputPart],
    shapes: dict[int, KnownShape],
    *,
    file_encoder: FileEncoder,
    writer: Any,
    progress: ReadProgress,
    processes: int,
) -> dict[int, Statistics]:
    """Encode `parts` in child processes; returns the statistics of each file by its number.

    Rows go to `writer`, statistics and problems to `file_encoder`. `shapes` holds the shape of each
    file by its number. Raises DataError if a child does.
    """
    scratch = file_encoder.scratch
    stop = threading.Event()  # set by the first child that fails

    def job(number: int) -> Callable[[], dict[str, Any]]:
        part_request = {
            "step": "part",
            "base": request["base"],
            "settings": request["settings"],
            "sources": request.get("sources"),
            "scratch": str(scratch),
            "progress": str(scratch / f"{number}.progress"),
            "raw_pairs": list(file_encoder.raw_pairs.items()),
            "parts": [
                _describe(n, *parts[n], shapes) for n in range(number, len(parts), processes)
            ],
        }
        tick = _sum_progress(progress, scratch, processes) if number == 0 else lambda: None

        def run() -> dict[str, Any]:
            try:
                return process.run(
                    "data",
                    scratch / f"{number}.json",
                    part_request,
                    log=scratch / f"{number}.log",
                    stop_asked=stop.is_set,
                    tick=tick,
                    environment={"TOKENIZERS_PARALLELISM": "false"},  # the processes are parallel
                )
            except BaseException:
                stop.set()
                raise

        return run

    outcomes = side_by_side([job(number) for number in range(processes)], at_once=processes)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        raise next((error for error in errors if isinstance(error, TuningError)), errors[0])
    results = {int(n): part for outcome in outcomes for n, part in outcome["parts"].items()}  # type: ignore[index]
    return _concatenate(parts, results, file_encoder, writer)


def _sum_progress(progress: ReadProgress, scratch: Path, processes: int) -> Callable[[], None]:
    """A tick that adds up the progress of all processes."""
    paths = [scratch / f"{number}.progress" for number in range(processes)]

    def tick() -> None:
        progress.done = sum(read[0] for path in paths if (read := read_progress.read(path)))
        progress.add(0)

    return tick


def _concatenate(
    parts: Sequence[InputPart],
    results: dict[int, dict[str, Any]],
    file_encoder: FileEncoder,
    writer: Any,
) -> dict[int, Statistics]:
    """Concatenate rows, statistics and problems in the order of parts."""
    by_file: dict[int, Statistics] = {}
    problems: dict[int, int] = {}
    raw_pairs = dict(file_encoder.raw_pairs)  # decided by each process where the first rows do not
    for number, (input, _) in enumerate(parts):
        result = results[number]
        statistics = Statistics.from_json(result["statistics"])
        file_encoder.statistics.add(statistics)
        by_file.setdefault(input.number, Statistics()).add(statistics)
        file_encoder.problems.extend(Problem(*fields) for fields in result["problems"])
        problems[input.number] = problems.get(input.number, 0) + len(result["problems"])
        if (raw := result["raw_pairs"]) is not None:
            if raw_pairs.get(input.part) is None:
                raw_pairs[input.part] = raw
            elif raw_pairs[input.part] != raw:
                file_encoder.problems.add(
                    "DATA-214",
                    input.shown,
                    "holds prompts that are rendered as chats, and prompts that are not",
                    "render all prompts, or none: then the chat template is applied to each",
                )
        path = _rows_path(file_encoder.scratch, number)
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as rows:
            for batch in range(rows.num_record_batches):
                writer.write_batch(rows.get_batch(batch))
        path.unlink()
    for input in {input.number: input for input, _ in parts}.values():
        if not by_file[input.number].seen and not problems[input.number]:
            file_encoder.add_empty(input.shown)
    return by_file


def _rows_path(scratch: Path, number: int) -> Path:
    return scratch / f"{number:05}.arrow"


def _describe(
    number: int, input: Input, part: Part, shapes: dict[int, KnownShape]
) -> dict[str, Any]:
    known = shapes[input.number]
    return {
        "number": number,
        "input": asdict(input) | {"path": str(input.path)},
        "part": asdict(part),
        "shape": asdict(known.shape) | {"required": sorted(known.shape.required)},
        "place": known.place,
    }


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The step "part": encode the parts that `request` lists, each to a file of its own."""
    scratch = Path(request["scratch"])
    progress = ReadProgress(Path(request["progress"]), 0)
    file_encoder, _ = from_request(request, scratch=scratch, progress=progress)
    file_encoder.raw_pairs = dict(request["raw_pairs"])
    parts = request["parts"]
    return {"parts": {str(part["number"]): _encode_part(part, file_encoder) for part in parts}}


def _encode_part(description: dict[str, Any], shared: FileEncoder) -> dict[str, Any]:
    file, part, shape = description["input"], Part(**description["part"]), description["shape"]
    input = Input(**file | {"path": Path(file["path"]), "kind": FileType(**file["kind"])})
    columns = tuple((use, column) for use, column in shape["columns"])
    known = KnownShape(
        Shape(**shape | {"columns": columns, "required": frozenset(shape["required"])}),
        description["place"],
    )
    file_encoder = FileEncoder(
        shared.encoder,
        shared.columns,
        Problems(),
        shared.scratch,
        shared.tick,
        raw_pairs=shared.raw_pairs,
    )
    notes_before = dict(shared.encoder.notes)
    with open_writer(_rows_path(shared.scratch, description["number"])) as writer:
        statistics, _ = file_encoder.encode(input, writer, part=part, known=known)
    for text, count in shared.encoder.notes.items():
        statistics.notes[text] += count - notes_before.get(text, 0)
    return {
        "statistics": statistics.to_json(),
        "problems": file_encoder.problems.to_json(),
        "raw_pairs": file_encoder.raw_pairs.get(input.part),
    }
