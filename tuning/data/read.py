"""Files -> batches of rows, each with its place, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
import csv
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from tuning.data import sniff
from tuning.data.problems import Problems
from tuning.errors import DataError
from tuning.formats import KNOWN_COLUMNS, quoted, type_name

ROWS = 1000
MAX_LINE = 10 << 20
MAX_DEPTH = 100


@dataclass(frozen=True)
class Batch:
    """Some rows of one file; `places` are line numbers or row numbers, counted from 1."""

    unit: str  # "line" or "row"
    places: list[int]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A file to read and where to note what is wrong with it."""

    path: Path
    shown: str
    kind: sniff.Kind
    problems: Problems
    scratch: Path  # a folder for what cannot be read as a stream
    wanted: frozenset[str] = frozenset()  # columns the user named, beside the known ones

    def bad(self, place: str, code: str, what: str, change: str) -> None:
        """Note a problem at `place`, such as "line 7"."""
        self.problems.add(code, f"{self.shown} {place}".rstrip(), what, change)


def batches(source: Source) -> Iterator[Batch]:
    """The rows of `source`. A row that cannot be read is noted and left out.

    Raises DataError when there are too many problems; what ends a file early is noted as one.
    """
    readers = {
        "parquet": _parquet,
        "arrow": _arrow,
        "arrow-stream": _arrow,
        "jsonl": _json_lines,
        "json": _json_values,
        "csv": _separated,
        "tsv": _separated,
    }
    try:
        yield from readers[source.kind.format](source)
    except DataError as error:
        if len(error.problems) > 1:  # the collector has had enough
            raise
        for problem in error.problems:
            source.problems.add(problem.code, problem.where, problem.what, problem.change)


class _NotJson(ValueError):
    """Valid to Python's parser, but no JSON that we take: `args` are code, what, change."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotJson("DATA-208", f"the key {quoted(twice)} stands twice", "keep one of the two")
    return made


def _constant(name: str) -> Any:
    raise _NotJson("DATA-206", f"{name} is no JSON value", "write null, or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _parse(line: str) -> dict[str, Any]:
    """The object that `line` holds. Raises ValueError, of which _NotJson says more."""
    try:
        value = _DECODER.decode(line)
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        what = f"is {type_name(value)}, not an object"
        raise _NotJson("DATA-209", what, 'write one object a row: {"messages": [...]}')
    if line.count("[") + line.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    return value


def _too_deep() -> _NotJson:
    return _NotJson("DATA-210", f"is nested more than {MAX_DEPTH} levels deep", "write it flat")


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[list[bytes], bool]]:
    """Whole lines without their ends, in bundles, and whether the last of them had no end.

    A line longer than MAX_LINE comes as its first MAX_LINE + 1 bytes.
    """
    carry = b""
    skipping = False
    for piece in pieces:
        first, newline, rest = piece.partition(b"\n")
        if not skipping:
            carry += first
            if len(carry) > MAX_LINE:
                carry, skipping = carry[: MAX_LINE + 1], True
        if newline:
            *whole, last = rest.split(b"\n")
            yield [carry, *whole], False
            carry, skipping = last, False
    if carry:
        yield [carry], True


def _decoded(lines: list[bytes]) -> list[str] | None:
    """All of `lines` as text, or None if one of them is not UTF-8."""
    try:
        return b"\n".join(lines).decode().split("\n")
    except UnicodeDecodeError:
        return None


def _json_lines(source: Source) -> Iterator[Batch]:
    number, offset = 0, 0
    for raw, unended in _lines(_without_bom(source)):
        texts = _decoded(raw)
        places: list[int] = []
        rows: list[dict[str, Any]] = []
        for index, line in enumerate(raw):
            number += 1
            try:
                text = texts[index] if texts is not None else line.decode()
                if text and not text.isspace():
                    if len(line) > MAX_LINE:
                        raise _NotJson(
                            "DATA-211",
                            f"is longer than {MAX_LINE >> 20} MiB",
                            "split the row, or check that the file has one row a line",
                        )
                    rows.append(_parse(text))
                    places.append(number)
            except ValueError as error:
                cut = unended and index == len(raw) - 1
                place = f"line {number} (byte {offset})"
                source.bad(place, *_json_problem(error, cut=cut))
            offset += len(line) + 1
        for start in range(0, len(rows), ROWS):
            yield Batch("line", places[start : start + ROWS], rows[start : start + ROWS])


def _json_problem(error: ValueError, *, cut: bool) -> tuple[str, str, str]:
    if isinstance(error, _NotJson):
        code, what, change = error.args
        return code, what, change
    if isinstance(error, UnicodeDecodeError):
        what = f"byte {error.start} of it (0x{error.object[error.start]:02x}) is not UTF-8"
        return "DATA-205", what, "save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        at_end = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        if cut and at_end:
            what = f"the file is cut in the middle of it: {error.msg}"
            return "DATA-203", what, "download or write the file again"
        what = f"is not JSON: {error.msg} at character {error.pos + 1}"
        return "DATA-202", what, "repair the line"
    return "DATA-202", f"is not JSON: {quoted(str(error))}", "repair the line"


def _without_bom(source: Source) -> Iterator[bytes]:
    pieces = sniff.chunks(source.path, source.kind.compression, source.shown)
    first = next(pieces, b"")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from pieces


class _Scanner:
    """Reads one JSON value after the other from a text that arrives in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self.ended = False

    def _more(self) -> None:
        piece = next(self._pieces, None)
        self.ended = piece is None
        text = self._decoder.decode(piece or b"", final=self.ended)
        self._text = self._text[self._at :] + text
        self._at = 0

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if self.ended:
                return ""
            self._more()

    def skip(self, wanted: str) -> bool:
        """Whether the next character is `wanted`, which is then passed."""
        found = self.peek() == wanted
        self._at += found
        return found

    def value(self) -> Any:
        """The next value. Raises ValueError."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self.ended or isinstance(value, (dict, list, str)):
                    self._at = end
                    return value
            except RecursionError:
                raise _too_deep() from None
            except json.JSONDecodeError:
                if self.ended:
                    raise
                if len(self._text) - self._at > MAX_LINE:
                    raise _NotJson(
                        "DATA-211", f"is longer than {MAX_LINE >> 20} MiB, or damaged", "repair it"
                    ) from None
            self._more()


def _json_values(source: Source) -> Iterator[Batch]:
    """The rows of an array, of an array inside an object, or of objects one after the other."""
    scanner = _Scanner(_without_bom(source))
    places: list[int] = []
    rows: list[dict[str, Any]] = []
    number = 0
    try:
        for value in _elements(scanner):
            number += 1
            if isinstance(value, dict) and _depth(value) <= MAX_DEPTH:
                rows.append(value)
                places.append(number)
            elif isinstance(value, dict):
                source.bad(f"row {number}", *_too_deep().args)
            else:
                what = f"is {type_name(value)}, not an object"
                source.bad(f"row {number}", "DATA-209", what, "write one object a row")
            if len(rows) == ROWS:
                yield Batch("row", places, rows)
                places, rows = [], []
    except UnicodeDecodeError as error:
        what = f"near it a byte (0x{error.object[error.start]:02x}) is not UTF-8"
        source.bad(f"row {number + 1}", "DATA-205", what, "save the file as UTF-8")
    except ValueError as error:
        source.bad(f"row {number + 1}", *_json_problem(error, cut=scanner.ended))
    if rows:
        yield Batch("row", places, rows)


def _elements(scanner: _Scanner) -> Iterator[Any]:
    if scanner.skip("["):
        yield from _array(scanner)
    elif scanner.peek() == "{":
        yield from _wrapped(scanner)
    if scanner.peek():
        raise _NotJson("DATA-202", "more follows after the end of the rows", "remove it")


def _array(scanner: _Scanner) -> Iterator[Any]:
    if scanner.skip("]"):
        return
    while True:
        yield scanner.value()
        if scanner.skip("]"):
            return
        if not scanner.skip(","):
            if scanner.ended and not scanner.peek():
                raise _NotJson("DATA-203", "the file ends in the middle", "download it again")
            raise _NotJson("DATA-202", "is not followed by a comma or ]", "repair the array")


def _wrapped(scanner: _Scanner) -> Iterator[Any]:
    """The rows of `{"data": [...]}`; an object that wraps none is a row itself."""
    scanner.skip("{")
    rest: list[tuple[str, Any]] = []
    found = False
    while not scanner.skip("}"):
        key = scanner.value()
        if not isinstance(key, str) or not scanner.skip(":"):
            raise _NotJson("DATA-202", "is not an object: a key is missing", "repair it")
        if key in ("data", "rows", "train", "items", "records") and scanner.skip("["):
            found = True
            yield from _array(scanner)
        else:
            rest.append((key, scanner.value()))
        if not scanner.skip(",") and scanner.peek() != "}":
            if not scanner.peek():
                raise _NotJson("DATA-203", "the file ends in the middle", "download it again")
            raise _NotJson("DATA-202", "is not an object: a comma is missing", "repair it")
    if not found:
        yield _unique(rest)
        while scanner.peek() == "{":  # objects over several lines each
            yield scanner.value()


def _separated(source: Source) -> Iterator[Batch]:
    csv.field_size_limit(MAX_LINE)
    delimiter = "," if source.kind.format == "csv" else "\t"
    reader = csv.reader(_text_lines(source), delimiter=delimiter, strict=True)
    header: list[str] = []
    places: list[int] = []
    rows: list[dict[str, Any]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            what = f"the column {quoted(twice)} stands twice in the header"
            source.bad("line 1", "DATA-208", what, "name each column once")
            return
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                rows.append(dict(zip(header, fields, strict=True)))
                places.append(start)
            elif fields:
                what = f"has {len(fields)} fields, the header has {len(header)}"
                change = "put fields that hold a separator, a quote or a line end in quotes"
                source.bad(f"line {start}", "DATA-240", what, change)
            start = reader.line_num + 1
            if len(rows) == ROWS:
                yield Batch("line", places, rows)
                places, rows = [], []
    except csv.Error as error:
        what = f"is not {source.kind.format.upper()}: {error}"
        change = "put fields that hold a separator, a quote or a line end in quotes"
        source.bad(f"line {reader.line_num}", "DATA-240", what, change)
    except UnicodeDecodeError as error:
        what = f"a byte (0x{error.object[error.start]:02x}) is not UTF-8"
        source.bad(f"line {reader.line_num + 1}", "DATA-205", what, "save the file as UTF-8")
    if rows:
        yield Batch("line", places, rows)


def _text_lines(source: Source) -> Iterator[str]:
    for raw, unended in _lines(_without_bom(source)):
        last = len(raw) - 1
        for index, line in enumerate(raw):
            yield line.decode() + ("" if unended and index == last else "\n")


def _parquet(source: Source) -> Iterator[Batch]:
    with _plain_file(source) as path:
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                names = file.schema_arrow.names
                used = _used(names, source)
                found = file.iter_batches(batch_size=ROWS, columns=used, use_threads=False)
                yield from _tables(found, names)
        except (pa.ArrowException, OSError) as error:
            source.bad("", *_unreadable("parquet", error))


def _arrow(source: Source) -> Iterator[Batch]:
    opened = pa.ipc.open_file if source.kind.format == "arrow" else pa.ipc.open_stream
    with _plain_file(source) as path:
        try:
            with pa.memory_map(str(path)) as mapped, opened(mapped) as reader:
                if source.kind.format == "arrow":
                    found = (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    found = iter(reader)
                names = reader.schema.names
                used = _used(names, source)
                parts = (
                    batch.select(used).slice(start, ROWS)
                    for batch in found
                    for start in range(0, batch.num_rows, ROWS)
                )
                yield from _tables(parts, names)
        except (pa.ArrowException, OSError) as error:
            source.bad("", *_unreadable("arrow", error))


def _unreadable(name: str, error: Exception) -> tuple[str, str, str]:
    said = quoted(str(error).splitlines()[0] if str(error) else type(error).__name__)
    what = f"is a {name} file that cannot be read, probably cut: {said}"
    return "DATA-237", what, "download or write it again"


def _used(names: list[str], source: Source) -> list[str]:
    """The columns that may matter: others can be large, or of types that Python has not."""
    return [name for name in names if name in KNOWN_COLUMNS or name in source.wanted]


def _tables(found: Iterable[pa.RecordBatch], names: list[str]) -> Iterator[Batch]:
    number = 0
    for batch in found:
        places = list(range(number + 1, number + 1 + batch.num_rows))
        number += batch.num_rows
        unused = dict.fromkeys(name for name in names if name not in batch.schema.names)
        rows = batch.to_pylist()
        yield Batch("row", places, [row | unused for row in rows] if unused else rows)


class _plain_file:
    """The file itself, or an uncompressed copy of it for the time of a `with`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        source = self._source
        if source.kind.compression is None:
            return source.path
        self._folder = tempfile.TemporaryDirectory(dir=source.scratch, prefix=".plain-")
        copy = Path(self._folder.name, "file")
        with copy.open("wb") as out:
            for piece in sniff.chunks(source.path, source.kind.compression, source.shown):
                out.write(piece)
        return copy

    def __exit__(self, *_: object) -> None:
        if self._folder:
            self._folder.cleanup()
