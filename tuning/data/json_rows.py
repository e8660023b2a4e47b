"""Rows of JSON files: one object per line, an array, or an array wrapped in an object."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from tuning.data import sniff
from tuning.data.formats import quoted, type_name
from tuning.data.formats.cells import DECODER, NotJson, unique
from tuning.data.source import (
    BATCH_ROWS,
    MAX_LINE,
    Batch,
    BatchBuilder,
    Source,
    lines,
    raw_bytes,
    text_bytes,
)

MAX_DEPTH = 100
_SPLITS = ("validation", "valid", "val", "test", "eval", "dev")


def _parse(line: str) -> dict[str, Any]:
    """The object in `line`. Raises ValueError, or its subclass NotJson."""
    try:
        value = DECODER.decode(line)
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        what = f"is {type_name(value)}, not an object"
        raise NotJson("DATA-209", what, 'write one object per row: {"messages": [...]}')
    if line.count("[") + line.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    return value


def _too_deep() -> NotJson:
    return NotJson("DATA-210", f"is nested more than {MAX_DEPTH} levels deep", "write it flat")


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


def _decoded(lines: list[bytes]) -> list[str] | None:
    """All of `lines` as text, or None if one of them is not UTF-8."""
    try:
        return b"\n".join(lines).decode().split("\n")
    except UnicodeDecodeError:
        return None


def one_a_line(source: Source) -> Iterator[Batch]:
    """The rows of a file with one object per line."""
    number, offset = source.part.before, source.part.begin
    for raw, unended in lines(raw_bytes(source)):
        if offset == 0 and raw[0].startswith(codecs.BOM_UTF8):
            raw[0] = raw[0].removeprefix(codecs.BOM_UTF8)
            offset = len(codecs.BOM_UTF8)
        texts = _decoded(raw)
        places: list[int] = []
        rows: list[dict[str, Any]] = []
        for index, line in enumerate(raw):
            number += 1
            try:
                text = texts[index] if texts is not None else line.decode()
                text = text.removeprefix("\ufeff")  # of files that were joined
                if text and not text.isspace():
                    if len(line) > MAX_LINE:
                        raise NotJson(
                            "DATA-211",
                            f"is longer than {MAX_LINE >> 20} MiB",
                            "split the row, or check that the file has one row per line",
                        )
                    rows.append(_parse(text))
                    places.append(number)
            except ValueError as error:
                cut = unended and index == len(raw) - 1
                place = f"line {number} (byte {offset})"
                source.bad(place, *_json_problem(error, cut=cut))
            offset += len(line) + 1
        for start in range(0, len(rows), BATCH_ROWS):
            end = start + BATCH_ROWS
            yield Batch("line", places[start:end], rows[start:end])


def _json_problem(error: ValueError, *, cut: bool) -> tuple[str, str, str]:
    if isinstance(error, NotJson):
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


def _holds_rows(key: str, value: Any) -> bool:
    """Whether a key beside that of the rows holds rows as well."""
    objects = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    return bool(objects or (key in _SPLITS and value))


def _two_row_keys(one: str, other: str) -> NotJson:
    what = f'holds rows under two keys, "{one}" and "{other}"'
    return NotJson("DATA-249", what, "write the rows to train on into a file of their own")


class _Scanner:
    """Parses consecutive JSON values from a text that arrives in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = self._before = 0
        self.ended = False

    @property
    def position(self) -> int:
        """How many characters have been parsed."""
        return self._before + self._at

    def _more(self) -> None:
        piece = next(self._pieces, None)
        self.ended = piece is None
        text = self._decoder.decode(piece or b"", final=self.ended)
        self._text = self._text[self._at :] + text
        self._before += self._at
        self._at = 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if self.ended:
                return ""
            self._more()

    def skip(self, character: str) -> bool:
        """Skip `character` if it is the next one; returns whether it was."""
        is_next = self.peek() == character
        self._at += is_next
        return is_next

    def value(self) -> Any:
        """The next value. Raises ValueError."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self.ended or isinstance(value, (dict, list, str)):
                    self._at = end
                    return value
            except RecursionError:
                raise _too_deep() from None
            except json.JSONDecodeError:
                if self.ended:
                    raise
                if len(self._text) - self._at > MAX_LINE:
                    raise NotJson(
                        "DATA-211", f"is longer than {MAX_LINE >> 20} MiB, or damaged", "repair it"
                    ) from None
            self._more()


def values(source: Source) -> Iterator[Batch]:
    """The rows of an array, of an array inside an object, or of consecutive objects."""
    scanner = _Scanner(text_bytes(source))
    builder = BatchBuilder("row")
    number, before = 0, 0
    try:
        for value in _elements(scanner):
            number += 1
            size, before = scanner.position - before, scanner.position
            if isinstance(value, dict) and _depth(value) <= MAX_DEPTH:
                yield from builder.add(number, value, size)
            elif isinstance(value, dict):
                source.bad(f"row {number}", *_too_deep().args)
            else:
                what = f"is {type_name(value)}, not an object"
                source.bad(f"row {number}", "DATA-209", what, "write one object per row")
    except UnicodeDecodeError as error:
        what = f"near it a byte (0x{error.object[error.start]:02x}) is not UTF-8"
        source.bad(f"row {number + 1}", "DATA-205", what, "save the file as UTF-8")
    except ValueError as error:
        source.bad(f"row {number + 1}", *_json_problem(error, cut=scanner.ended))
    yield from builder.rest()


def _elements(scanner: _Scanner) -> Iterator[Any]:
    if scanner.skip("["):
        yield from _array(scanner)
    elif scanner.peek() == "{":
        yield from _wrapped(scanner)
    if scanner.peek():
        raise NotJson("DATA-202", "more follows after the end of the rows", "remove it")


def _array(scanner: _Scanner) -> Iterator[Any]:
    if scanner.skip("]"):
        return
    while True:
        yield scanner.value()
        if scanner.skip("]"):
            return
        if not scanner.skip(","):
            if scanner.ended and not scanner.peek():
                raise NotJson("DATA-203", "the file ends in the middle", "download it again")
            raise NotJson("DATA-202", "is not followed by a comma or ]", "repair the array")


def _wrapped(scanner: _Scanner) -> Iterator[Any]:
    """The rows of `{"data": [...]}`; any other object is a row itself."""
    scanner.skip("{")
    rest: list[tuple[str, Any]] = []
    rows_key = ""
    while not scanner.skip("}"):
        key = scanner.value()
        if not isinstance(key, str) or not scanner.skip(":"):
            raise NotJson("DATA-202", "is not an object: a key is missing", "repair it")
        if key in sniff.WRAPPERS and scanner.skip("["):
            if rows_key:
                raise _two_row_keys(rows_key, key)
            rows_key = key
            yield from _array(scanner)
        else:
            value = scanner.value()
            rest.append((key, value))
        if rows_key and (other := next((k for k, v in rest if _holds_rows(k, v)), None)):
            raise _two_row_keys(rows_key, other)
        if not scanner.skip(",") and scanner.peek() != "}":
            if not scanner.peek():
                raise NotJson("DATA-203", "the file ends in the middle", "download it again")
            raise NotJson("DATA-202", "is not an object: a comma is missing", "repair it")
    if not rows_key:
        yield unique(rest)
        while scanner.peek() == "{":  # pretty-printed objects
            yield scanner.value()
