"""One layer of an image as an uncompressed tar stream.

`plain` opens it; `peek_layer` reads the small files at its beginning, and of weights only the
header, so that an adapter of gigabytes can be inspected by its first kilobytes.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Collection
from typing import Any

from tuning import files, safetensors
from tuning.errors import SpecError
from tuning.oci.layout import tar
from tuning.oci.layout.manifest import LARGEST_JSON, Blob, refused
from tuning.oci.layout.tar import BadTar, Content, Source

HIGHEST_RATIO = 200  # of decompression
WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # usual names; never read


class Plain:
    """A layer's tar stream; it computes the digest of a compressed one."""

    def __init__(self, source: Source, *, limit: int | None, where: str) -> None:
        self._source, self._limit, self._where = source, limit, where
        self._hash = hashlib.sha256()
        self._count = 0

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes. Raises RefusedError for a stream that grows beyond its limit."""
        piece = self._source.read(min(size, files.CHUNK))
        if self._limit is not None:
            self._count += len(piece)
            if self._count > self._limit:
                raise refused(self._where, "has a compressed layer that unpacks to far too much")
            self._hash.update(piece)
        return piece

    @property
    def digest(self) -> str | None:
        """Of the bytes read; None for an uncompressed layer, which has its blob's digest."""
        return None if self._limit is None else f"sha256:{self._hash.hexdigest()}"


def plain(raw: Source, blob: Blob, where: str) -> Plain:
    """The tar stream of the layer `raw`, decompressed according to its first bytes.

    Raises RefusedError for a layer that is not a tar, SpecError for zstd without its library.
    """
    if "tar" not in blob.media_type:
        raise refused(where, f"has a layer of type {blob.media_type[:80]!r}, which is not a tar")
    head = b""
    while len(head) < 4 and (piece := raw.read(4 - len(head))):
        head += piece
    source: Any = _Rewound(head, raw)
    limit = blob.size * HIGHEST_RATIO + files.CHUNK
    if head[:2] == b"\x1f\x8b":
        return Plain(gzip.GzipFile(fileobj=source), limit=limit, where=where)
    if head == b"\x28\xb5\x2f\xfd":
        return Plain(_zstd(source, where), limit=limit, where=where)
    return Plain(source, limit=None, where=where)


class _Rewound:
    """A stream that starts with the bytes already read of it."""

    def __init__(self, head: bytes, rest: Source) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int, /) -> bytes:
        if self._head:
            piece, self._head = self._head[:size], self._head[size:]
            return piece
        return self._rest.read(size)


class _Zstd:
    """A zstd stream that raises BadTar."""

    def __init__(self, stream: Any, error: type[Exception]) -> None:
        self._stream, self._error = stream, error

    def read(self, size: int, /) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except self._error as error:
            raise BadTar(str(error)) from None


def _zstd(raw: Any, where: str) -> _Zstd:
    try:
        import zstandard
    except ImportError:
        what, change = "has a zstd layer", "install the extra: pip install 'tuning-jobs[train]'"
        raise SpecError.at("IMAGE-104", where, what, change) from None
    stream = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
        raw, read_across_frames=True
    )
    return _Zstd(stream, zstandard.ZstdError)


def peek_layer(raw: Source, blob: Blob, where: str, wanted: Collection[str]) -> dict[str, bytes]:
    """The `wanted` files under data/ of a layer that are within `raw`, by name.

    Of a safetensors file only the header, with the eight bytes of its length, of a pickle nothing.
    `raw` may end early.
    Nothing is checked against the blob's digest. Raises RefusedError.
    """
    contents: dict[str, bytes] = {}
    try:
        for entry, content in tar.entries(plain(raw, blob, where)):
            below, data, name = entry.name.removeprefix("./").partition("data/")
            fresh = name in wanted and name not in contents
            if data and not below and fresh and entry.kind == tar.REGULAR:
                if name.endswith(PICKLES):
                    contents[name] = b""
                else:
                    contents[name] = _header(content) if name.endswith(WEIGHTS) else _small(content)
            if len(contents) == len(wanted):
                break
    except (BadTar, EOFError, zlib.error, gzip.BadGzipFile):
        pass  # `raw` ended early
    return contents


def _small(content: Content) -> bytes:
    data = _exactly(content, LARGEST_JSON + 1, short=True)
    if len(data) > LARGEST_JSON:
        raise BadTar("it has a document of impossible size")
    return data


def _header(content: Content) -> bytes:
    start = _exactly(content, 8)
    try:
        length = safetensors.header_length(start, limit=LARGEST_JSON)
    except ValueError:
        raise BadTar("its weights have a header of impossible size") from None
    return start + _exactly(content, length)


def _exactly(content: Content, size: int, *, short: bool = False) -> bytes:
    data = b""
    while len(data) < size and (piece := content.read(size - len(data))):
        data += piece
    if len(data) < size and not short:
        raise BadTar("it ends within a header")
    return data
