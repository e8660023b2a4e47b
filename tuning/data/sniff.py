"""Detects the type of a file by its content; the name only decides ambiguous cases.

Servers' names are not trusted and URLs often have none, so the first bytes decide. If the name (or
DatasetConfig.dataset_extension) and the bytes are of different families of formats, the file is
refused: a wrong file is more likely than a wrong name.
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
# Text that compresses better is a decompression bomb, unless it is small.
MAX_RATIO, FREE_BYTES = 200, 64 << 20

WRAPPERS = ("data", "rows", "train", "items", "records")  # keys of an object that hold its rows
_BINARY = {"parquet": "parquet", "pq": "parquet", "arrow": "arrow", "feather": "arrow"}
_TEXTUAL = {"json", "jsonl", "ndjson", "csv", "tsv", "txt"}
_FOREIGN = (  # magic, offset, name: formats that users provide by mistake
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
_ARTICLE = {"parquet": "a parquet", "arrow": "an arrow"}
_SUPPORTED = "give JSONL, JSON, CSV, TSV, parquet or arrow, plain or as gzip or zstd"


@dataclass(frozen=True)
class FileType:
    """How to read one file."""

    format: Format
    compression: Compression | None = None


def compression_of(head: bytes) -> Compression | None:
    """The compression of a file that begins with `head`."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if head[:4] == b"\x28\xb5\x2f\xfd" else None


def sniff(path: Path, shown: str, extension: str | None) -> FileType:
    """The type of the file at `path`. `shown` is its name in messages, and gives its extension.

    `extension` (dataset_extension) replaces the name's own. Raises DataError for other files.
    """
    with path.open("rb") as file:
        compression = compression_of(file.read(4))
    head = b""
    for piece in chunks(path, compression, shown):
        head += piece
        if len(head) >= HEAD:
            break
    if not head:
        raise DataError.at("DATA-201", shown, "is empty", "give a file with rows")
    return FileType(format_of(head, shown, extension), compression)


def _extension(name: str) -> str:
    """The extension of `name`, without compression suffix, query or dot."""
    name = re.split(r"[?#]", name)[0].rstrip("/").rsplit("/", 1)[-1].lower()
    for suffix in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(suffix)
    return name.rsplit(".", 1)[-1] if name else ""


def format_of(head: bytes, shown: str, extension: str | None = None) -> Format:
    """The format of a file whose uncompressed content begins with `head`. Raises DataError.

    `shown` and `extension` as for `sniff`.
    """
    named = _extension(extension or shown)
    if head[:4] == b"PAR1":
        _check_name(named, shown, "parquet")
        return "parquet"
    if head[:6] == b"ARROW1" or (head[:4] == b"\xff\xff\xff\xff" and b"\x10\0\0\0" in head[:16]):
        _check_name(named, shown, "arrow")
        return "arrow" if head[:6] == b"ARROW1" else "arrow-stream"
    for magic, offset, name in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise _foreign(name, shown)
    _refuse_wrong_text(head, shown)
    if named in _BINARY:
        family = _BINARY[named]
        what = f"is not {_ARTICLE[family]} file: it begins with {_bytes(head)}"
        change = (
            f"give the {family} file itself, or set DatasetConfig.dataset_extension to its format"
        )
        raise DataError.at("DATA-238", shown, what, change)
    return _text_format(head.removeprefix(b"\xef\xbb\xbf"), named, shown)


def _check_name(named: str, shown: str, family: str) -> None:
    if named in _TEXTUAL or (named in _BINARY and _BINARY[named] != family):
        what = f"is named {named} but is {_ARTICLE[family]} file"
        change = f"rename it, or set DatasetConfig.dataset_extension: {family}"
        raise DataError.at("DATA-238", shown, what, change)


def _foreign(name: str, shown: str) -> DataError:
    if name in ("a gzip file", "a zstd file"):
        change = "compress it once, or not at all"
        return DataError.at("DATA-241", shown, "is compressed twice", change)
    if name in _ARCHIVED:
        change = "unpack it and give the data files in it, or use gzip or zstd on a single file"
    else:
        change = _SUPPORTED
    return DataError.at("DATA-241", shown, f"is {name}", change)


def _refuse_wrong_text(head: bytes, shown: str) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[:200].count(0) > len(head[:200]) // 4:
        what = "is UTF-16 or UTF-32 text" if head[:2] != b"\0\0" else "is binary data"
        raise DataError.at("DATA-204", shown, what, "save it as UTF-8")
    start = head.lstrip()[:200].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")):
        what = f"is a web page, not data: it begins with {_bytes(head.lstrip())}"
        change = "check the link: it may have expired or need a login"
        raise DataError.at("DATA-242", shown, what, change)
    if start.startswith(b"version https://git-lfs"):
        what = "is a pointer of Git LFS, not the data"
        raise DataError.at("DATA-248", shown, what, "fetch the file itself (git lfs pull)")


def _text_format(head: bytes, named: str, shown: str) -> Format:
    start = head.lstrip()
    if not start:
        return "jsonl"  # blank so far; reading it counts the rows
    first_line, _, rest = start.partition(b"\n")
    if start[:1] == b"[":
        # one array, or lines that are arrays, which reading refuses one by one
        return "jsonl" if _is_json(first_line) and rest.strip() else "json"
    if start[:1] == b"{":
        if _is_json(first_line):
            return "json" if not rest.strip() and _wraps_rows(first_line) else "jsonl"
        # an object over several lines, or a first line that is damaged or longer than `head`
        opens = re.match(rb'\{\s*(\r?\n|$)|\{\s*"(data|rows|train|items|records)"\s*:\s*\[', start)
        return "json" if opens or (named == "json" and not rest.strip()) else "jsonl"
    tabs, commas = first_line.count(b"\t"), first_line.count(b",")
    if named == "tsv" or tabs > commas:
        return "tsv"
    others = [c for c in (b";", b"|") if first_line.count(c) > commas]
    if others:
        what = f"has columns separated by {others[0].decode()!r}"
        raise DataError.at("DATA-252", shown, what, "save it with commas (csv) or tabs (tsv)")
    if named == "csv" or commas:
        return "csv"
    if named in ("json", "jsonl", "ndjson"):
        return "jsonl"  # reading it reports each wrong line
    what = f"is in an unknown format: it begins with {_bytes(head)}"
    raise DataError.at("DATA-241", shown, what, _SUPPORTED)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _wraps_rows(line: bytes) -> bool:
    """Whether a JSON object holds its rows under one of WRAPPERS."""
    value = json.loads(line)
    for key in WRAPPERS:
        rows = value.get(key)
        is_rows = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        if is_rows and (rows or len(value) == 1):
            return True
    return False


def chunks(path: Path, compression: Compression | None, shown: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, in pieces of bounded size. Raises DataError on damage."""
    if compression is None:
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece
        return
    total, most = 0, most_bytes(path.stat().st_size)
    decompress = _gunzip if compression == "gzip" else _unzstd
    for piece in decompress(path, shown):
        total += len(piece)
        if total > most:
            raise too_much(shown)
        yield piece


def most_bytes(size: int) -> int:
    """The bytes to which a compressed file of `size` bytes may grow."""
    return max(FREE_BYTES, MAX_RATIO * size)


def too_much(shown: str) -> DataError:
    """The error of a file that grows beyond that."""
    what = f"grows to more than {MAX_RATIO} times its size when decompressed"
    return DataError.at("DATA-253", shown, what, "give the data uncompressed")


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
    import pyarrow as pa  # its stream gives pieces of bounded size; that of zstandard does not

    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
        while True:
            try:
                piece = stream.read(CHUNK)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise (_cut if "runcated" in str(error) else _damaged)("zstd", shown) from error
            if not piece:
                return
            yield piece


def _cut(name: str, shown: str) -> DataError:
    what = f"is a {name} file that ends too early"
    return DataError.at("DATA-203", shown, what, "download or compress it again")


def _damaged(name: str, shown: str) -> DataError:
    what = f"is a damaged {name} file"
    return DataError.at("DATA-243", shown, what, "download or compress it again")


def _bytes(head: bytes) -> str:
    text = head[:24].decode("utf-8", "replace")
    return '"' + "".join(c if c.isprintable() and c != "�" else "." for c in text) + '"'
