"""How far reading has come, in a small file, for whoever shows it to a person."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tuning import files

EVERY = 0.5  # seconds


class Meter:
    """Counts bytes of `total`, and says so in the file `path` now and then."""

    def __init__(self, path: Path, total: int, *, every: float = EVERY) -> None:
        self.path, self.total, self.done, self.every = path, total, 0, every
        self._last = time.monotonic()

    def add(self, size: int) -> None:
        """`size` bytes more are done."""
        self.done += size
        now = time.monotonic()
        if now - self._last >= self.every:
            self._last = now
            self.path.write_text(json.dumps({"done": self.done, "total": self.total}))


def read(path: Path) -> tuple[int, int] | None:
    """Bytes done, and in all; None if nothing is known yet."""
    try:
        said = files.read_json(path)
    except (OSError, ValueError):
        return None
    return said["done"], said["total"]
