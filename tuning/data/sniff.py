"""What a file is, decided by its content; its name only settles what content leaves open.

Server names are not trusted and URLs often name nothing, so the first bytes decide. Where a name
(or DatasetConfig.dataset_extension) says one family of formats and the bytes say another, the file
is refused: it is more often a wrong file than a wrong name.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuning.errors import DataError

Format = Literal["parquet", "arrow", "arrow-stream", "jsonl", "json", "csv", "tsv"]
Compression = Literal["gzip", "zstd"]

HEAD = 1 << 16
CHUNK = 1 << 20
# A text that shrinks more than this is no training data but a bomb; small files may do so.
MAX_RATIO, FREE_BYTES = 200, 64 << 20

WRAPPERS = ("data", "rows", "train", "items", "records")  # keys under which an object has rows
_BINARY = {"parquet": "parquet", "pq": "parquet", "arrow": "arrow", "feather": "arrow"}
_TEXTUAL = {"json", "jsonl", "ndjson", "csv", "tsv", "txt"}
_FOREIGN = (  # magic, offset, name: formats that people hand over by mistake
    (b"PK\x03\x04", 0, "a zip archive"),
    (b"ustar", 257, "a tar archive"),
    (b"BZh", 0, "a bzip2 file"),
    (b"\xfd7zXZ\0", 0, "an xz file"),
    (b"7z\xbc\xaf", 0, "a 7-zip archive"),
    (b"Rar!", 0, "a rar archive"),
    (b"\x1f\x8b", 0, "a gzip file"),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd file"),
    (b"%PDF", 0, "a PDF document"),
    (b"SQLite format 3", 0, "a database"),
    (b"\x89PNG", 0, "a picture"),
    (b"\x80\x04\x95", 0, "a Python pickle"),
    (b"\x93NUMPY", 0, "a NumPy array"),
)
_ARCHIVED = {"a zip archive", "a tar archive", "a 7-zip archive", "a rar archive"}


@dataclass(frozen=True)
class Kind:
    """How to read one file."""

    format: Format
    compression: Compression | None = None
    note: str = ""


def compression_of(head: bytes) -> Compression | None:
    """The compression that `head`, a file's first bytes, shows."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if head[:4] == b"\x28\xb5\x2f\xfd" else None


def sniff(path: Path, shown: str, extension: str | None) -> Kind:
    """What the file at `path` is. `shown` is its name for people and for its extension.

    `extension` (dataset_extension) replaces the name's own. Raises DataError for what is no data.
    """
    with path.open("rb") as file:
        compression = compression_of(file.read(4))
    head = b""
    for piece in chunks(path, compression, shown):
        head += piece
        if len(head) >= HEAD:
            break
    if not head:
        raise _error("DATA-201", shown, "is empty", "give a file with rows")
    named = _named(extension or shown)
    return Kind(_format(head, named, shown), compression)


def format_of(head: bytes, name: str) -> Format:
    """The format that `head`, a file's first bytes in the clear, shows. Raises DataError."""
    return _format(head, _named(name), name)


def _named(name: str) -> str:
    """The extension in `name`, without compression suffix, query or dot."""
    name = re.split(r"[?#]", name)[0].rstrip("/").rsplit("/", 1)[-1].lower()
    for suffix in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(suffix)
    return name.rsplit(".", 1)[-1] if name else ""


def _format(head: bytes, named: str, shown: str) -> Format:
    if head[:4] == b"PAR1":
        _agree(named, "parquet", shown, "parquet")
        return "parquet"
    if head[:6] == b"ARROW1" or (head[:4] == b"\xff\xff\xff\xff" and b"\x10\0\0\0" in head[:16]):
        _agree(named, "arrow", shown, "arrow")
        return "arrow" if head[:6] == b"ARROW1" else "arrow-stream"
    for magic, offset, name in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise _foreign(name, shown)
    _refuse_wrong_text(head, shown)
    if named in _BINARY:
        family = _BINARY[named]
        what = f"is no {family} file: it begins with {_bytes(head)}"
        change = (
            f"give the {family} file itself, or set DatasetConfig.dataset_extension to its format"
        )
        raise _error("DATA-238", shown, what, change)
    return _text_format(head.removeprefix(b"\xef\xbb\xbf"), named, shown)


def _agree(named: str, family: str, shown: str, actual: str) -> None:
    if named in _TEXTUAL or (named in _BINARY and _BINARY[named] != family):
        what = (
            f"is named {named} but is an {actual} file"
            if actual == "arrow"
            else (f"is named {named} but is a {actual} file")
        )
        change = f"rename it, or set DatasetConfig.dataset_extension: {actual}"
        raise _error("DATA-238", shown, what, change)


def _foreign(name: str, shown: str) -> DataError:
    if name in ("a gzip file", "a zstd file"):
        return _error("DATA-241", shown, "is compressed twice", "compress it once, or not at all")
    what = f"is {name}"
    if name in _ARCHIVED:
        change = "unpack it and give the data files in it, or use gzip or zstd on a single file"
    else:
        change = "give JSONL, JSON, CSV, TSV, parquet or arrow, plain or as gzip or zstd"
    return _error("DATA-241", shown, what, change)


def _refuse_wrong_text(head: bytes, shown: str) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[:200].count(0) > len(head[:200]) // 4:
        what = "is UTF-16 or UTF-32 text" if head[:2] != b"\0\0" else "is binary data"
        raise _error("DATA-204", shown, what, "save it as UTF-8")
    start = head.lstrip()[:200].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")):
        what = f"is a web page, not data: it begins with {_bytes(head.lstrip())}"
        change = "check the link: it may have expired or need a login"
        raise _error("DATA-242", shown, what, change)
    if start.startswith(b"version https://git-lfs"):
        what = "is a pointer of Git LFS, not the data"
        raise _error("DATA-248", shown, what, "fetch the file itself (git lfs pull)")


def _text_format(head: bytes, named: str, shown: str) -> Format:
    start = head.lstrip()
    if not start:
        return "jsonl"  # blank so far: the reader counts the rows
    first_line, _, rest = start.partition(b"\n")
    if start[:1] == b"[":
        # one array, or a file of lines that are arrays, which the line reader refuses one by one
        return "jsonl" if _is_json(first_line) and rest.strip() else "json"
    if start[:1] == b"{":
        if _is_json(first_line):
            return "json" if not rest.strip() and _wraps_rows(first_line) else "jsonl"
        # an object over several lines, or a first line that is damaged or longer than the head
        opens = re.match(rb'\{\s*(\r?\n|$)|\{\s*"(data|rows|train|items|records)"\s*:\s*\[', start)
        return "json" if opens or (named == "json" and not rest.strip()) else "jsonl"
    tabs, commas = first_line.count(b"\t"), first_line.count(b",")
    if named == "tsv" or tabs > commas:
        return "tsv"
    others = [c for c in (b";", b"|") if first_line.count(c) > commas]
    if others:
        what = f"has columns separated by {others[0].decode()!r}"
        raise _error("DATA-252", shown, what, "save it with commas (csv) or tabs (tsv)")
    if named == "csv" or commas:
        return "csv"
    if named in ("json", "jsonl", "ndjson"):
        return "jsonl"  # its reader says what is wrong with which line
    what = f"is in no format that is read: it begins with {_bytes(head)}"
    change = "give JSONL, JSON, CSV, TSV, parquet or arrow, plain or as gzip or zstd"
    raise _error("DATA-241", shown, what, change)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _wraps_rows(line: bytes) -> bool:
    value = json.loads(line)
    return isinstance(value, dict) and wrapped_key(value) is not None


def wrapped_key(value: dict[str, object]) -> str | None:
    """The key under which `value` holds the rows, if it is an object that wraps them."""
    for key in WRAPPERS:
        rows = value.get(key)
        good = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        if good and (rows or len(value) == 1):
            return key
    return None


def chunks(path: Path, compression: Compression | None, shown: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, in pieces of bounded size. Raises DataError on damage."""
    if compression is None:
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece
        return
    made = 0
    size = path.stat().st_size
    inflate = _gunzip if compression == "gzip" else _unzstd
    for piece in inflate(path, shown):
        made += len(piece)
        if made > FREE_BYTES and made > MAX_RATIO * size:
            what = f"grows to more than {MAX_RATIO} times its size when decompressed"
            raise _error("DATA-253", shown, what, "give the data uncompressed")
        yield piece


def _gunzip(path: Path, shown: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        member = zlib.decompressobj(wbits=31)
        waiting = b""
        try:
            while True:
                waiting = waiting or file.read(CHUNK)
                if not waiting:
                    break
                if member.eof:  # another member follows, as pigz and bgzip write them
                    if not waiting.strip(b"\0"):
                        waiting = b""
                        continue
                    member = zlib.decompressobj(wbits=31)
                piece = member.decompress(waiting, CHUNK)
                waiting = member.unconsumed_tail or member.unused_data
                if piece:
                    yield piece
        except zlib.error as error:
            raise _damaged("gzip", shown) from error
    if not member.eof:
        raise _cut("gzip", shown)


def _unzstd(path: Path, shown: str) -> Iterator[bytes]:
    import zstandard

    frame = None
    with path.open("rb") as file:
        try:
            # small bites: a bite of a bomb grows by up to 32768 times
            while bite := file.read(2048):
                while bite:
                    if frame is None or frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    piece = frame.decompress(bite)
                    bite = frame.unused_data if frame.eof else b""
                    if piece:
                        yield piece
        except zstandard.ZstdError as error:
            raise _damaged("zstd", shown) from error
    if frame is not None and not frame.eof:
        raise _cut("zstd", shown)


def _cut(name: str, shown: str) -> DataError:
    what = f"is a {name} file that ends too early"
    return _error("DATA-203", shown, what, "download or compress it again")


def _damaged(name: str, shown: str) -> DataError:
    what = f"is a damaged {name} file"
    return _error("DATA-243", shown, what, "download or compress it again")


def _bytes(head: bytes) -> str:
    text = head[:24].decode("utf-8", "replace")
    return '"' + "".join(c if c.isprintable() and c != "�" else "." for c in text) + '"'


def _error(code: str, shown: str, what: str, change: str) -> DataError:
    return DataError.at(code, shown, what, change)
