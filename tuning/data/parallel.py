"""Parts of files, read side by side by processes of their own; the rows come out in order.

Each process is `python -m tuning.process data REQUEST` with the step "part". It writes the rows of
each of its parts to an Arrow file; here they are put one behind the other. Nothing of the result
depends on how many processes there were.
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
from tuning.data import meter as meters
from tuning.data.formats import Shape
from tuning.data.meter import Meter
from tuning.data.parts import Part
from tuning.data.reader import Input, Known, Reader, reader_of, writing
from tuning.data.sniff import Kind
from tuning.data.tally import Tally
from tuning.errors import Problem, TuningError
from tuning.threads import side_by_side

Work = tuple[Input, Part]


def read(
    request: dict[str, Any],
    work: Sequence[Work],
    known: dict[int, Known],
    *,
    reader: Reader,
    writer: Any,
    meter: Meter,
    processes: int,
) -> dict[int, Tally]:
    """Read `work` by `processes` processes; give the tally of each file, by its number.

    Rows go to `writer`, counts and problems to `reader`. Raises DataError for what ends it early.
    """
    stop = threading.Event()  # one that fails ends the others

    def job(number: int) -> Callable[[], dict[str, Any]]:
        numbers = range(number, len(work), processes)
        asked = _request(request, number, [(n, *work[n]) for n in numbers], known, reader)
        tick = _told(meter, reader.scratch, processes) if number == 0 else lambda: None

        def run() -> dict[str, Any]:
            try:
                return process.run(
                    "data",
                    reader.scratch / f"{number}.json",
                    asked,
                    log=reader.scratch / f"{number}.log",
                    stop_asked=stop.is_set,
                    tick=tick,
                    environment={"TOKENIZERS_PARALLELISM": "false"},  # the processes are that
                )
            except BaseException:
                stop.set()
                raise

        return run

    done = side_by_side([job(number) for number in range(processes)], at_once=processes)
    errors = [outcome for outcome in done if isinstance(outcome, BaseException)]
    if errors:
        raise next((error for error in errors if isinstance(error, TuningError)), errors[0])
    answers = {int(n): part for told in done for n, part in told["parts"].items()}  # type: ignore[index]
    return _together(work, answers, reader, writer)


def _told(meter: Meter, scratch: Path, processes: int) -> Callable[[], None]:
    """A tick that adds up what all processes say of their progress."""
    paths = [scratch / f"{number}.progress" for number in range(processes)]

    def tick() -> None:
        meter.done = sum(said[0] for path in paths if (said := meters.read(path)))
        meter.add(0)

    return tick


def _together(
    work: Sequence[Work], answers: dict[int, dict[str, Any]], reader: Reader, writer: Any
) -> dict[int, Tally]:
    """Put rows, counts and problems one behind the other."""
    tallies: dict[int, Tally] = {}
    problems: dict[int, int] = {}
    for number, (input, _) in enumerate(work):
        answer = answers[number]
        tally = Tally.from_json(answer["tally"])
        reader.tally.add(tally)
        tallies.setdefault(input.number, Tally()).add(tally)
        reader.problems.extend(Problem(*fields) for fields in answer["problems"])
        problems[input.number] = problems.get(input.number, 0) + len(answer["problems"])
        path = _rows(reader.scratch, number)
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as rows:
            for batch in range(rows.num_record_batches):
                writer.write_batch(rows.get_batch(batch))
        path.unlink()
    for input in {input.number: input for input, _ in work}.values():
        if not tallies[input.number].seen and not problems[input.number]:
            reader.empty(input.shown)
    return tallies


def _rows(scratch: Path, number: int) -> Path:
    return scratch / f"{number:05}.arrow"


def _request(
    request: dict[str, Any],
    number: int,
    parts: Sequence[tuple[int, Input, Part]],
    known: dict[int, Known],
    reader: Reader,
) -> dict[str, Any]:
    """What the process `number` is asked: `parts`, each with its own number."""
    return {
        "step": "part",
        "base": request["base"],
        "settings": request["settings"],
        "scratch": str(reader.scratch),
        "progress": str(reader.scratch / f"{number}.progress"),
        "raw_pairs": reader.encoder.raw_pairs,
        "parts": [_describe(*part, known) for part in parts],
    }


def _describe(number: int, input: Input, part: Part, known: dict[int, Known]) -> dict[str, Any]:
    shape = known[input.number].shape
    return {
        "number": number,
        "file": input.number,
        "path": str(input.path),
        "shown": input.shown,
        "kind": asdict(input.kind),
        "part": asdict(part),
        "shape": asdict(shape) | {"required": sorted(shape.required)},
        "began": known[input.number].began,
    }


def work(request: dict[str, Any]) -> dict[str, Any]:
    """The step "part": read the parts that `request` lists, each to a file of its own."""
    scratch = Path(request["scratch"])
    meter = Meter(Path(request["progress"]), 0)
    reader, _ = reader_of(request, scratch=scratch, meter=meter)
    reader.encoder.raw_pairs = request["raw_pairs"]
    return {"parts": {str(part["number"]): _read_part(part, reader) for part in request["parts"]}}


def _read_part(asked: dict[str, Any], reader: Reader) -> dict[str, Any]:
    kind, part = Kind(**asked["kind"]), Part(**asked["part"])
    input = Input(asked["file"], Path(asked["path"]), asked["shown"], kind)
    shape = asked["shape"]
    columns = tuple((use, column) for use, column in shape["columns"])
    known = Known(
        Shape(shape["name"], columns, shape["reason"], frozenset(shape["required"])),
        asked["began"],
    )
    mine = Reader(
        reader.encoder, reader.columns, type(reader.problems)(), reader.scratch, reader.tick
    )
    before = dict(reader.encoder.notes)
    with writing(_rows(reader.scratch, asked["number"])) as writer:
        tally, _ = mine.take(input, writer, part=part, known=known)
    for text, count in reader.encoder.notes.items():
        tally.notes[text] += count - before.get(text, 0)
    return {"tally": tally.to_json(), "problems": mine.problems.to_json()}
