"""Writes read progress to a file, and reads it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tuning import files

INTERVAL_SECONDS = 0.5


class ReadProgress:
    """Counts bytes of `total`, and writes the count to `path` at intervals."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total, self.done = path, total, 0
        self._written = time.monotonic()

    def add(self, size: int) -> None:
        """Count `size` more bytes."""
        self.done += size
        now = time.monotonic()
        if now - self._written >= INTERVAL_SECONDS:
            self._written = now
            self.path.write_text(json.dumps({"done": self.done, "total": self.total}))


def read(path: Path) -> tuple[int, int] | None:
    """Bytes done and total; None before the first write."""
    try:
        record = files.read_json(path)
    except (OSError, ValueError):
        return None
    return record["done"], record["total"]
