"""The step "tokenise": files -> rows of token ids with their trained ranges."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tuning import files
from tuning.data import read, sniff
from tuning.data.chat import Template
from tuning.data.encode import Encoded, Encoder
from tuning.data.problems import Problems
from tuning.data.source import Batch, Source
from tuning.errors import DataError, SpecError
from tuning.formats import BadRow, Columns, Example, Fault, Shape, detect, to_example

log = logging.getLogger(__name__)

PREVIEWED, PREVIEWED_TOKENS = 20, 1000
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.int32())),
        ("file", pa.int32()),
        ("place", pa.int64()),
    ]
)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out the request; see the package's docstring. Raises DataError or SpecError."""
    settings = request["settings"]
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.arrow", "preview.json", "tokenised.json"):
        (out / name).unlink(missing_ok=True)
    tokenizer = load_tokenizer(Path(request["base"]))
    template = load_template(tokenizer, settings.get("chat_template"))
    encoder = Encoder(tokenizer, template, train_on=settings.get("train_on") or "assistant")
    columns = Columns(
        settings.get("messages_column"),
        settings.get("context_column"),
        settings.get("response_column"),
    )
    job = _Job(encoder, columns, Problems(), out)
    scratch = out / ".rows.arrow.tmp"
    try:
        with (
            _rows_without_cycles(),
            pa.OSFile(str(scratch), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as writer,
        ):
            for number, file in enumerate(request["files"]):
                job.take(number, file, settings.get("dataset_extension"), writer)
        job.problems.raise_all()
        if not job.lengths:
            raise _nothing_trained(job)
        scratch.replace(out / "rows.arrow")
    finally:
        scratch.unlink(missing_ok=True)
    files.sync_folder(out)
    files.write_json(out / "preview.json", job.preview(tokenizer))
    result = job.result(template) | {"bos": tokenizer.bos_token_id}
    files.write_json(out / "tokenised.json", result)
    return result


@contextlib.contextmanager
def _rows_without_cycles() -> Iterator[None]:
    """Let the cycle collector look rarely: rows are many small objects, and none point back.

    Saves an eighth of the time, since it no longer walks them again and again.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def load_tokenizer(base: Path) -> Any:
    """The tokenizer in the folder `base`. Raises SpecError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library raises whatever its parsers raise
        raise SpecError.at(
            "DATA-246",
            "base model",
            f"its tokenizer cannot be loaded ({type(error).__name__}: {str(error)[:200]})",
            "take a base model with tokenizer.json",
        ) from error
    if not tokenizer.is_fast:
        what = f"its tokenizer ({type(tokenizer).__name__}) tells no character offsets"
        raise SpecError.at("DATA-246", "base model", what, "take one with tokenizer.json")
    return tokenizer


def load_template(tokenizer: Any, text: str | None) -> Template | None:
    """The chat template: the user's `text`, or the tokenizer's own if it has one."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    source = text or own
    if not source:
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=source)
    except Exception as error:
        if type(error).__name__ == "TemplateSyntaxError":
            where = "ModelConfig.chat_template" if text else "the base model's chat template"
            what = f"is no valid template: {error}"
            raise SpecError.at("DATA-245", where, what, "repair it") from error
    return Template(tokenizer, source)


def _nothing_trained(job: _Job) -> DataError:
    return DataError.at(
        "DATA-230",
        "data",
        f"none of the {sum(job.dropped.values())} rows has a token to learn",
        "check the labels, or the columns that hold the answers",
    )


@dataclasses.dataclass
class _Job:
    """What grows while the files are read."""

    encoder: Encoder
    columns: Columns
    problems: Problems
    out: Path
    shape: Shape | None = None
    began: str = ""
    began_file: int = 0
    tokens: int = 0
    trained: int = 0
    lengths: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: list[tuple[str, Encoded]] = dataclasses.field(default_factory=list)

    def take(self, number: int, file: dict[str, Any], extension: str | None, writer: Any) -> None:
        """Read file `number` and write its rows."""
        path, shown = Path(file["path"]), str(file["shown"])
        try:
            kind = sniff.sniff(path, shown, extension)
        except DataError as error:
            for problem in error.problems:
                self.problems.add(problem.code, problem.where, problem.what, problem.change)
            return
        before, seen, rows = len(self.problems), 0, 0
        source = Source(path, shown, kind, self.problems, self.out, self._wanted())
        shape: Shape | None = None
        for batch in read.batches(source):
            if not seen:
                shape = self._shape(number, shown, batch)
            seen += len(batch.rows)
            if shape is None:
                break
            rows += self._write(number, shown, shape, batch, writer)
            log.debug("tokenised %d rows of %s", seen, shown)
        if not seen and len(self.problems) == before:
            self.problems.add("DATA-201", shown, "holds no rows", "give a file with rows")
        self.files.append(
            {
                "shown": shown,
                "format": kind.format,
                "compression": kind.compression,
                "rows": rows,
                "shape": shape.name if shape else None,
                "reason": shape.reason if shape else None,
            }
        )

    def _wanted(self) -> frozenset[str]:
        named = (self.columns.messages, self.columns.context, self.columns.response)
        return frozenset(name for name in named if name)

    def _shape(self, number: int, shown: str, batch: Batch) -> Shape | None:
        """The shape of a file, from its first row; None, and a problem, if it cannot be used."""
        where = f"{shown} {batch.unit} {batch.places[0]}"
        try:
            shape = detect(batch.rows[0], self.columns)
        except BadRow as bad:
            self._note(bad.faults, where)
            return None
        if self.shape is None:
            self.shape, self.began, self.began_file = shape, where, number
        elif shape.name != self.shape.name:
            what = (
                f"is of shape {shape.name} ({shape.reason}), but {self.began} is of shape "
                f"{self.shape.name} ({self.shape.reason})"
            )
            change = "train on one shape at a time: give every file the same columns"
            self.problems.add("DATA-215", where, what, change)
            return None
        return shape

    def _note(self, faults: Sequence[Fault], where: str) -> None:
        for fault in faults:
            what = fault.what
            if fault.code == "DATA-214":
                what += f" ({self.began})"
            self.problems.add(fault.code, where, what, fault.change)

    def _write(self, number: int, shown: str, shape: Shape, batch: Batch, writer: Any) -> int:
        places: list[int] = []
        examples: list[Example] = []
        for place, row in zip(batch.places, batch.rows, strict=True):
            try:
                examples.append(to_example(row, shape))
                places.append(place)
            except BadRow as bad:
                self._note(bad.faults, f"{shown} {batch.unit} {place}")
        kept: list[Encoded] = []
        kept_places: list[int] = []
        for place, encoded in zip(places, self.encoder.encode(examples), strict=True):
            where = f"{shown} {batch.unit} {place}"
            if isinstance(encoded, Fault):
                if encoded.code == "DATA-244":  # true of every row alike
                    raise DataError.at(encoded.code, where, encoded.what, encoded.change)
                self._note([encoded], where)
            elif not encoded.trained or encoded.trained[-1] < 2:
                self.dropped["no token to learn"] += 1
            else:
                kept.append(encoded)
                kept_places.append(place)
                if len(self.samples) < PREVIEWED:
                    self.samples.append((where, encoded))
        if kept:
            writer.write_batch(_record(kept, kept_places, number))
            self._count(kept)
        return len(kept)

    def _count(self, kept: Sequence[Encoded]) -> None:
        self.lengths.extend([len(encoded.ids) for encoded in kept])
        for encoded in kept:
            self.tokens += len(encoded.ids)
            marks = encoded.trained
            self.trained += sum(marks[1::2]) - sum(marks[::2]) - (marks[0] == 0)

    def preview(self, tokenizer: Any) -> list[dict[str, Any]]:
        """The first rows, token by token, each token with whether it is trained."""
        return [
            {"where": where, "tokens": spelled(tokenizer, encoded)}
            for where, encoded in self.samples
        ]

    def result(self, template: Template | None) -> dict[str, Any]:
        """The answer to the request."""
        assert self.shape is not None
        notes = [f"{text} ({n} rows)" if n else text for text, n in _counted(template)]
        if self.dropped:
            notes += [f"{n} rows left out: {why}" for why, n in sorted(self.dropped.items())]
        rows_per_file: Counter[str] = Counter()
        for file in self.files:
            rows_per_file[file["shown"]] += file["rows"]
        return {
            "rows": len(self.lengths),
            "rows_per_file": dict(rows_per_file),
            "files": self.files,
            "shape": {"name": self.shape.name, "reason": self.shape.reason},
            "rendering": self._rendering(),
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "lengths": _lengths(np.frombuffer(self.lengths, dtype=np.int32)),
            "dropped": dict(self.dropped),
            "notes": notes,
        }

    def _rendering(self) -> str:
        assert self.shape is not None
        if self.shape.name in ("messages", "sharegpt"):
            return "conversations through the chat template"
        if self.shape.name in ("text", "tokens"):
            return "all tokens as they are"
        if self.encoder.pairs_are_chats:
            return "pairs as a user turn and an assistant turn through the chat template"
        return "pairs as running text: the prompt, then the completion"


def flags(encoded: Encoded) -> list[bool]:
    """For each token whether it is trained."""
    made = [False] * len(encoded.ids)
    for start, end in _ranges(encoded.trained):
        made[start:end] = [True] * (end - start)
    return made


def spelled(tokenizer: Any, encoded: Encoded) -> list[list[Any]]:
    """[text, trained] for each of the first tokens; those that share a character are joined."""
    made: list[list[Any]] = []
    run: list[int] = []
    for token, trained in list(zip(encoded.ids, flags(encoded), strict=True))[:PREVIEWED_TOKENS]:
        run.append(token)
        text = tokenizer.decode(run, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or len(run) > 4:
            made.append([text, trained])
            run = []
    return made


def _ranges(trained: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(trained[::2], trained[1::2], strict=True)


def _counted(template: Template | None) -> list[tuple[str, int]]:
    return sorted(template.notes.items()) if template else []


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


def _lengths(lengths: np.ndarray[Any, np.dtype[np.int32]]) -> dict[str, Any]:
    found, counts = np.unique(lengths, return_counts=True)
    return {
        "mean": round(float(lengths.mean()), 1),
        "p50": int(np.percentile(lengths, 50, method="higher")),
        "p95": int(np.percentile(lengths, 95, method="higher")),
        "max": int(lengths.max()),
        "counts": [[int(n), int(c)] for n, c in zip(found, counts, strict=True)],
    }
