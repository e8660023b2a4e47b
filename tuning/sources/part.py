"""A partly received file: `NAME.part` on disk, and `NAME.part.json` with what is safe of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning import files
from tuning.network import answer
from tuning.network.answer import Headers, NotHttp
from tuning.sources.http import Item, encoding_of


@dataclass
class Part:
    """The received bytes, and which version of which file they belong to."""

    path: Path
    item: Item
    size: int = 0
    etag: str | None = None  # as sent, weak or strong
    modified: str | None = None  # Last-Modified as sent
    validator: str | None = None  # a strong ETag, or a Last-Modified that identifies the version
    encoding: str = ""  # Content-Encoding
    length: int | None = None  # of the whole file, if announced

    @classmethod
    def open(cls, target: Path, item: Item) -> Part:
        """The part as the last attempt left it, cut to what surely reached the disk."""
        part = cls(target.with_name(target.name + ".part"), item)
        try:
            state = files.read_json(part.record)
            if state["url"] == item.key and state["size"] <= part.path.stat().st_size:
                part._restore(state)
                os.truncate(part.path, part.size)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return cls(part.path, item)
        return part

    def _restore(self, state: dict[str, Any]) -> None:
        self.size, self.length = int(state["size"]), state["length"]
        self.validator, self.modified = state["validator"], state.get("modified")
        strong = self.validator if self.validator and '"' in self.validator else None
        self.etag, self.encoding = state.get("etag", strong), state.get("encoding", "")

    @property
    def record(self) -> Path:
        """The file that describes it."""
        return self.path.with_name(self.path.name + ".json")

    def headers(self) -> dict[str, str]:
        """Request headers for the rest, if the version of the received bytes is known."""
        if not self.size or not (self.validator or self.item.sha256):
            self.size = 0
            return {}
        condition = {"If-Range": self.validator} if self.validator else {}
        return {"Range": f"bytes={self.size}-", **condition}

    def begin(self, headers: Headers) -> int | None:
        """Begin with the version that a 200 announces; returns its length. Raises NotHttp."""
        answer.is_chunked(headers)
        length = answer.content_length(headers)
        self.restart()
        self.etag, self.modified = headers.get("etag"), headers.get("last-modified")
        strong = self.etag is not None and self.etag.startswith('"')
        self.validator = self.etag if strong else answer.modified_long_ago(headers)
        self.encoding, self.length = encoding_of(headers), length
        return length

    def restart(self) -> None:
        """Forget the received bytes, and of which version they are."""
        self.record.unlink(missing_ok=True)
        self.size, self.length, self.encoding = 0, None, ""
        self.etag = self.modified = self.validator = None

    def continued_by(self, headers: Headers) -> int | None:
        """The size after the body of this 206; None if it is of another version. Raises NotHttp."""
        body = answer.body_range(headers)
        if not self.size or body.start != self.size:
            raise NotHttp("has another range than the requested one")
        if body.total is not None and self.length not in (None, body.total):
            return None
        if not self._is_of_this_version(headers):
            return None
        self.length = self.length if body.total is None else body.total
        if self.length is None and not self.item.sha256:
            raise NotHttp("does not name the size of the file")
        return body.end

    def _is_of_this_version(self, headers: Headers) -> bool:
        """Whether all validators are those of the received bytes.

        With an entity tag a 206 may leave out Last-Modified (RFC 9110, 15.3.7).
        """
        etag, modified = headers.get("etag"), headers.get("last-modified")
        same = modified == self.modified or (modified is None and self.etag is not None)
        return etag == self.etag and same and encoding_of(headers) == self.encoding

    def completed_by(self, headers: Headers) -> bool:
        """Whether this 416 says that nothing is missing. Raises NotHttp."""
        of_file = answer.content_range(headers)
        if headers.get("etag", self.etag) != self.etag or of_file is None:
            return False
        return 0 < self.size == of_file.total == self.length

    def discard(self) -> None:
        """Remove what was received."""
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def save(self) -> None:
        """Record `size` bytes, once they are on the disk."""
        state = {
            "url": self.item.key,
            "size": self.size,
            "validator": self.validator,
            "etag": self.etag,
            "modified": self.modified,
            "encoding": self.encoding,
            "length": self.length,
        }
        files.write_json(self.record, state)
