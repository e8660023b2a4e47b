"""Read untrusted tar archives, entry by entry: strict, in constant memory.

Python's tarfile reads extension headers of any size into memory and keeps every entry. This reads
what layers need: USTAR, GNU's long names, and PAX's two names; an archive whose extensions would
change what a plain reader sees (sizes, sparse files) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
LARGEST_EXTENSION = 1 << 16  # bytes of a PAX or long-name header
REGULAR, HARD_LINK, FOLDER = b"0", b"1", b"5"
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")


class BadTar(ValueError):
    """Not a tar archive, or it uses an unsupported feature."""


class Source(Protocol):
    """A readable stream."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


@dataclass(frozen=True)
class Entry:
    """One entry: name and link target as written, kind, and size in bytes."""

    name: str
    kind: bytes
    size: int
    target: str


class Content:
    """The content of the current entry."""

    def __init__(self, source: Source, size: int) -> None:
        self._source, self._left = source, size
        self._padding = -size % BLOCK

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        piece = self._source.read(min(size, self._left)) if self._left else b""
        if self._left and not piece:
            raise BadTar("it ends within a file")
        self._left -= len(piece)
        return piece

    def whole(self) -> bytes:
        """All of it, if it is small."""
        if self._left > LARGEST_EXTENSION:
            raise BadTar("it has an extension header of impossible size")
        return b"".join(iter(lambda: self.read(LARGEST_EXTENSION), b""))

    def skip(self) -> None:
        """Skip to the next entry."""
        while self.read(1 << 20):
            pass
        self._left, self._padding = self._padding, 0
        while self._left:
            self.read(BLOCK)


def entries(source: Source) -> Iterator[tuple[Entry, Content]]:
    """The archive's entries in order; each content must be read before the next entry.

    Raises BadTar.
    """
    names: dict[str, str] = {}  # of the next entry, by extension headers
    while block := _block(source):
        if not block.strip(b"\0"):
            while rest := source.read(1 << 20):
                if rest.strip(b"\0"):
                    raise BadTar("there is data after its end")
            return
        kind, size = _checked(block)
        content = Content(source, size)
        if kind in (b"x", b"g"):
            renamed = _pax(content.whole())
            if kind == b"g" and renamed:
                raise BadTar("a global header renames its files")
            names |= renamed
        elif kind in (b"L", b"K"):
            key = "path" if kind == b"L" else "linkpath"
            names[key] = _text(content.whole().rstrip(b"\0"))
        else:
            name, target = names.get("path", _name(block)), _text(block[157:257])
            if kind == REGULAR and name.endswith("/"):  # a folder in the oldest tars
                kind = FOLDER
            yield Entry(name, kind, size, names.get("linkpath", target)), content
            names = {}
        content.skip()
    if names:
        raise BadTar("it ends after an extension header")


def _block(source: Source) -> bytes:
    """The next header; nothing at the end of the archive."""
    block = b""
    while len(block) < BLOCK:
        piece = source.read(BLOCK - len(block))
        if not piece:
            if block:
                raise BadTar("it ends within a header")
            return b""
        block += piece
    return block


def _checked(block: bytes) -> tuple[bytes, int]:
    """Kind and size of an entry. Raises BadTar for a damaged header."""
    if sum(block[:148]) + sum(block[156:]) + 8 * ord(" ") != _number(block[148:156]):
        raise BadTar("a header's checksum is wrong")
    kind = {b"\0": REGULAR, b"7": REGULAR}.get(block[156:157], block[156:157])
    if kind == b"S":
        raise BadTar("it has a sparse file")
    return kind, 0 if kind in _WITHOUT_CONTENT else _number(block[124:136])


def _number(field: bytes) -> int:
    if field[:1] == b"\x80" and len(field) > 8:  # GNU's form for numbers beyond octal digits
        number = int.from_bytes(field[1:], "big")
        if number >= 1 << 62:
            raise BadTar("a header has an impossible size")
        return number
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise BadTar("a header has an invalid number")
    return int(digits or b"0", 8)


def _name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """The names in a PAX header. Raises BadTar if it changes anything else."""
    names = {}
    while data:
        match = re.match(rb"([1-9][0-9]{0,5}) ", data)
        record = data[: int(match[1])] if match else b""
        key, equals, value = record[len(match[0]) if match else 0 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise BadTar("it has a damaged extension header")
        if key == b"size" or key.startswith(b"GNU.sparse"):
            raise BadTar("an extension header changes the size of a file")
        if key in (b"path", b"linkpath"):
            names[key.decode()] = _text(value)
        data = data[len(record) :]
    return names
