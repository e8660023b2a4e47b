"""A partly received file: `NAME.part` on disk, and `NAME.part.json` with what is safe of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tuning import files
from tuning.network.session import Response
from tuning.sources.http import Item

_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass
class Part:
    """The received bytes, and which version of which file they belong to."""

    path: Path
    item: Item
    size: int = 0
    validator: str | None = None  # a strong ETag, or Last-Modified
    modified: str | None = None  # Last-Modified, in any case
    length: int | None = None  # of the whole file

    @classmethod
    def open(cls, target: Path, item: Item) -> Part:
        """The part as the last attempt left it, cut to what surely reached the disk."""
        part = cls(target.with_name(target.name + ".part"), item)
        try:
            state = files.read_json(part.record)
            here = part.path.stat().st_size
        except (OSError, ValueError):
            return part
        if state["url"] == item.key and state["size"] <= here:
            part.size, part.validator = state["size"], state["validator"]
            part.modified = state.get("modified")
            part.length = state["length"]
            os.truncate(part.path, part.size)
        return part

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

    def restart(self, response: Response) -> None:
        """Begin again with the version that `response` announces."""
        self.record.unlink(missing_ok=True)
        self.size, self.validator = 0, _validator(response)
        self.modified = response.headers.get("last-modified")
        length = response.headers.get("content-length", "")
        self.length = int(length) if length.isdigit() and response.status == 200 else None

    def continued_by(self, response: Response) -> bool:
        """True if the body of this 206 continues the received bytes."""
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if not match or match[1] is None or int(match[1]) != self.size or not self.size:
            return False
        total = int(match[3]) if match[3] != "*" else None
        if self.length is not None and total is not None and total != self.length:
            return False
        self.length = self.length if total is None else total
        etag, modified = response.headers.get("etag"), response.headers.get("last-modified")
        other = etag and self.validator and '"' in self.validator and etag != self.validator
        return not (other or (modified and self.modified and modified != self.modified))

    def complete_at(self, response: Response) -> bool:
        """True if this 416 says that nothing is missing."""
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        return bool(match and self.size and match[3] == str(self.size))

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
            "modified": self.modified,
            "length": self.length,
        }
        files.write_json(self.record, state)


def _validator(response: Response) -> str | None:
    etag = response.headers.get("etag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("last-modified")
