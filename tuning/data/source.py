"""A file that is being read: its bytes, its lines, its rows in batches."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.data import sniff
from tuning.data.parts import Part
from tuning.data.problems import Problems

ROWS = 1000  # of a batch, and fewer where they are long:
BYTES = 1 << 20  # tokenised, a byte of text takes some hundred
MAX_LINE = 10 << 20


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
    part: Part = field(default_factory=Part)
    tick: Callable[[int], None] = lambda size: None  # told the bytes read since the last time

    def bad(self, place: str, code: str, what: str, change: str) -> None:
        """Note a problem at `place`, such as "line 7"."""
        self.problems.add(code, f"{self.shown} {place}".rstrip(), what, change)


class Gathered:
    """Rows that come one by one, as batches of bounded size."""

    def __init__(self, unit: str) -> None:
        self._unit, self._size = unit, 0
        self._places: list[int] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, place: int, row: dict[str, Any], size: int) -> Iterator[Batch]:
        """Take a row of about `size` bytes; gives a batch when one is full."""
        self._places.append(place)
        self._rows.append(row)
        self._size += size
        if len(self._rows) == ROWS or self._size >= BYTES:
            yield from self.rest()

    def rest(self) -> Iterator[Batch]:
        """What is not given yet."""
        if self._rows:
            batch = Batch(self._unit, self._places, self._rows)
            self._places, self._rows, self._size = [], [], 0
            yield batch


def lines(pieces: Iterable[bytes]) -> Iterator[tuple[list[bytes], bool]]:
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


def text_bytes(source: Source) -> Iterator[bytes]:
    """The decompressed bytes of a text file, without a byte order mark."""
    pieces = raw_bytes(source)
    first = next(pieces, b"")
    yield first.removeprefix(codecs.BOM_UTF8) if source.part.opens else first
    yield from pieces


def raw_bytes(source: Source) -> Iterator[bytes]:
    """The decompressed bytes of a text file."""
    part = source.part
    if source.kind.compression:
        shrink = 4  # a guess, for a bar; there is no knowing before the end
        for piece in sniff.chunks(source.path, source.kind.compression, source.shown):
            yield piece
            source.tick(len(piece) // shrink)
        return
    with source.path.open("rb") as file:
        file.seek(part.begin)
        while piece := file.read(
            sniff.CHUNK if part.end is None else min(sniff.CHUNK, part.end - file.tell())
        ):
            yield piece
            source.tick(len(piece))
