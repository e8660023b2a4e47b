"""A file being read: its bytes, lines, and rows in batches."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.data import sniff
from tuning.data.parts import Part
from tuning.data.problems import Problems

BATCH_ROWS = 1000
BATCH_BYTES = 1 << 20  # tokenised, a byte of text takes about a hundred bytes
MAX_LINE = 10 << 20


@dataclass(frozen=True)
class Batch:
    """Some rows of one file; `places` are line numbers or row numbers, counted from 1."""

    unit: str  # "line" or "row"
    places: list[int]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()  # what reading them could not keep


@dataclass(frozen=True)
class Source:
    """A file to read, and the collector of its problems."""

    path: Path
    shown: str
    kind: sniff.FileType
    problems: Problems
    scratch: Path  # a folder for uncompressed copies
    columns: frozenset[str] = frozenset()  # named by the user, in addition to the known ones
    part: Part = field(default_factory=Part)
    tick: Callable[[int], None] = lambda size: None  # called with the bytes read since the last

    def bad(self, place: str, code: str, what: str, change: str) -> None:
        """Add a problem at `place`, such as "line 7"."""
        self.problems.add(code, f"{self.shown} {place}".rstrip(), what, change)


class BatchBuilder:
    """Collects single rows into batches of bounded size."""

    def __init__(self, unit: str) -> None:
        self._unit, self._size = unit, 0
        self._places: list[int] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, place: int, row: dict[str, Any], size: int) -> Iterator[Batch]:
        """Add a row of about `size` bytes; yields a batch when it is full."""
        self._places.append(place)
        self._rows.append(row)
        self._size += size
        if len(self._rows) == BATCH_ROWS or self._size >= BATCH_BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[Batch]:
        """Yields the last batch."""
        if self._rows:
            batch = Batch(self._unit, self._places, self._rows)
            self._places, self._rows, self._size = [], [], 0
            yield batch


def lines(pieces: Iterable[bytes]) -> Iterator[tuple[list[bytes], bool]]:
    """Lists of complete lines without line ends, and whether the last line had no end.

    A line longer than MAX_LINE is cut to MAX_LINE + 1 bytes.
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
            *complete, last = rest.split(b"\n")
            yield [carry, *complete], False
            carry, skipping = last, False
    if carry:
        yield [carry], True


def text_bytes(source: Source) -> Iterator[bytes]:
    """The decompressed bytes of a text file, without a byte order mark."""
    pieces = raw_bytes(source)
    first = next(pieces, b"")
    yield first.removeprefix(codecs.BOM_UTF8) if source.part.begin == 0 else first
    yield from pieces


def raw_bytes(source: Source) -> Iterator[bytes]:
    """The decompressed bytes of a text file."""
    part = source.part
    if source.kind.compression:
        ratio = 4  # an estimate for the progress bar
        for piece in sniff.chunks(source.path, source.kind.compression, source.shown):
            yield piece
            source.tick(len(piece) // ratio)
        return
    with source.path.open("rb") as file:
        file.seek(part.begin)
        while piece := file.read(
            sniff.CHUNK if part.end is None else min(sniff.CHUNK, part.end - file.tell())
        ):
            yield piece
            source.tick(len(piece))
