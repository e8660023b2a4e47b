"""What an HTTP answer says of its body, read strictly: foreign headers, and where the body ends.

A body is accepted only if its end is known, and the bytes that came end there. Every reader of
bodies in the project keeps to these invariants:

1. A length is ASCII digits (`number`); a header that is anything else is a fault of the server and
   raises NotHttp, never "no length". Equal copies of Content-Length count as one.
2. `Transfer-Encoding` is absent or exactly `chunked`; any other coding hides where the body ends.
   A chunked body ends with a complete last chunk (`StrictResponse`), never with the connection.
   If a Content-Length came as well, both ends must agree.
3. Without either, the end of the connection ends the body: that may be a cut, so it is accepted
   only where a digest from elsewhere confirms it.
4. The bytes received equal the announced ones, neither fewer nor more: a Content-Length, the range
   of a 206, and in the end the file's total, which the first answer and each Content-Range named.
5. Every byte of a file comes from one version of it. Bytes are continued only by a 206 that starts
   where they end, names the same total, carries the same entity tag (a weak one counts here) and
   the same Last-Modified as the first answer, under the same Content-Encoding. Where a validator
   vanishes, appears or changes, the file is fetched again from its first byte. A 416 ends a file
   only at the total that the first answer announced.
6. A known digest (`#sha256=`, a layer's digest, the hub's listing) outranks all of it: bytes that
   do not have it are dropped.

What breaks one of them ends with exit code 20 and names the host; nothing half is ever named as
the file. `sources.download` and `sources.part` keep them for data, `oci.registry` for blobs and
manifests, `sources.hub_download` for base weights, `whole` for small documents.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import ProtocolError

Headers = Mapping[str, str]
LARGEST_DOCUMENT = 16 << 20  # bytes of a token, a listing or another small document
_NUMBER = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"bytes[ \t]+(?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)", re.I)
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")


class NotHttp(Exception):
    """An answer that HTTP does not allow: the text is a predicate ("has a ...")."""


def number(text: str) -> int | None:
    """The value of ASCII digits, fewer than 19; None for any other text."""
    return int(text) if _NUMBER.fullmatch(text) else None


def content_length(headers: Headers) -> int | None:
    """The announced length of a body in bytes, None if there is none. Raises NotHttp."""
    text = headers.get("content-length")
    if text is None:
        return None
    lengths = {number(part.strip(" \t")) for part in text.split(",")}
    if len(lengths) > 1 or None in lengths:
        raise NotHttp(f"has an invalid Content-Length ({_quoted(text)})")
    return lengths.pop()


def is_chunked(headers: Headers) -> bool:
    """Whether the body comes in chunks. Raises NotHttp for any other Transfer-Encoding."""
    coding = headers.get("transfer-encoding")
    if coding is None:
        return False
    if coding.lower() != "chunked":  # http.client takes exactly this as chunks
        raise NotHttp(f"has the Transfer-Encoding {_quoted(coding)}, so its end is unknown")
    return True


def is_open_ended(headers: Headers) -> bool:
    """Whether only the end of the connection ends the body. Raises NotHttp."""
    return not is_chunked(headers) and content_length(headers) is None


@dataclass(frozen=True)
class Range:
    """A Content-Range: first byte, end (exclusive) and total of the file; None if not named."""

    start: int | None
    end: int | None
    total: int | None


def content_range(headers: Headers) -> Range | None:
    """The Content-Range of an answer, None if it has none. Raises NotHttp for an invalid one."""
    text = headers.get("content-range")
    if text is None:
        return None
    match = _RANGE.fullmatch(text.strip(" \t"))
    if match is None:
        raise NotHttp(f"has an invalid Content-Range ({_quoted(text)})")
    start, last, total = (number(part or "") for part in match.groups())
    end = None if last is None else last + 1
    if start is not None and end is not None:
        most = end if total is None else total
        if not start < end <= most:
            raise NotHttp(f"has an impossible Content-Range ({_quoted(text)})")
    return Range(start, end, total)


def body_range(headers: Headers) -> Range:
    """The range of a 206's body. Raises NotHttp if it has none, or none that its length fits."""
    part = content_range(headers)
    if part is None or part.start is None or part.end is None:
        kind = headers.get("content-type", "").lower()
        several = "multipart/byteranges" in kind
        raise NotHttp("sends several ranges at once" if several else "sends a part without a range")
    is_chunked(headers)
    if content_length(headers) not in (None, part.end - part.start):
        raise NotHttp("has a Content-Length that differs from its Content-Range")
    return part


def modified_long_ago(headers: Headers) -> str | None:
    """The Last-Modified, if it identifies a version: the current second may see another one."""
    modified = headers.get("last-modified")
    then, now = _moment(modified), _moment(headers.get("date"))
    if modified is None or then is None:
        return None
    return modified if (time.time() if now is None else now) - then >= 1 else None


def _moment(text: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text or "").timestamp()
    except (ValueError, TypeError, OverflowError, IndexError, AttributeError, OSError):
        return None


def _quoted(text: str) -> str:
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return f'"{shown[:40]}{"..." if len(shown) > 40 else ""}"'


def whole(response: BaseHTTPResponse, largest: int = LARGEST_DOCUMENT) -> bytes:
    """All bytes of a small body, read to its announced end; of a larger one `largest` + 1 bytes.

    Raises NotHttp if its end is not announced as HTTP does it, an HTTPError if it breaks off.
    """
    headers, data = response.headers, bytearray()
    length = None if is_chunked(headers) else content_length(headers)
    while len(data) <= largest and (piece := response.read(largest + 1 - len(data))):
        data += piece
    if length is not None and len(data) < min(length, largest) and not _decoded(headers):
        raise ProtocolError(f"{len(data)} of {length} bytes")
    return bytes(data)


def _decoded(headers: Headers) -> bool:
    return headers.get("content-encoding", "identity").lower() != "identity"


class StrictResponse(http.client.HTTPResponse):
    """A response that ends where its framing says, as strictly as the module's docstring demands.

    http.client takes "000" as the last chunk though "0000a5" was cut, and any two bytes as the end
    of a chunk. Lengths that differ would make urllib3 drop the answer without closing it.
    """

    chunk_left: int | None

    def begin(self) -> None:
        """Read the head of the answer."""
        super().begin()
        lengths = ",".join(self.headers.get_all("content-length") or ())
        if len({length.strip() for length in lengths.split(",")}) > 1:
            raise http.client.HTTPException("two lengths")

    def _get_chunk_left(self) -> int | None:
        """Bytes left of the current chunk, None after the last one."""
        if self.chunk_left:
            return self.chunk_left
        if self.chunk_left is not None and self.fp.readline(3) != b"\r\n":
            raise http.client.IncompleteRead(b"")
        match = _CHUNK.fullmatch(self.fp.readline(1 << 12))
        if match is None:
            raise http.client.IncompleteRead(b"")
        self.chunk_left = int(match[1], 16)
        if not self.chunk_left:
            self._read_trailer()
            self._close_conn()  # type: ignore[attr-defined]
            self.chunk_left = None
        return self.chunk_left

    def _read_trailer(self) -> None:
        for _ in range(100):
            if self.fp.readline(1 << 12) in (b"\r\n", b"\n", b""):  # all data is here: may be cut
                return
        raise http.client.HTTPException("has too many trailers")
