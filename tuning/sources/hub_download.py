"""One file of a base model from the hub, verified; progress and stop over all of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning import files
from tuning.console import Report
from tuning.errors import Stopped, TransientError
from tuning.sources import hub, verify

if TYPE_CHECKING:
    from tuning.sources.base import Base, Entry


def download(
    base: Base, entry: Entry, *, cache: Path | None, token: str | None, memory: Path, meter: Meter
) -> None:
    """Download one file into the hub's cache; once more if its hash or size is wrong.

    Digests are remembered in `memory`. Raises TransientError, RefusedError or Stopped.
    """
    from huggingface_hub import hf_hub_download

    hub_id = str(base.hub_id)

    def work() -> Path:
        return Path(
            hf_hub_download(
                hub_id,
                entry.name,
                revision=base.revision,
                cache_dir=cache,
                token=token or None,
                endpoint=hub.endpoint(),
                tqdm_class=meter.bar(),
            )
        )

    for _ in range(2):
        if meter.stop():
            raise stopped(base)
        path = hub.ask(work, hub_id, base.revision, stop=meter.stop)
        if path.stat().st_size == entry.size and _is_listed(path, entry, memory):
            return
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    what = "differs from the hub's listing in size or hash"
    change = "run the same command again; it downloads the file anew"
    raise TransientError.at("HUB-115", f"{hub_id} {entry.name}", what, change)


def _is_listed(path: Path, entry: Entry, memory: Path) -> bool:
    """Whether the file has the hash of the hub's listing: sha256 of a large file, git's of a small.

    A file of another version may have the listed size.
    """
    if entry.sha256 is not None:
        return entry.sha256 == verify.digest(path, memory)
    if entry.git_id is None:
        return True
    blob = hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(files.CHUNK):
            blob.update(piece)
    return blob.hexdigest() == entry.git_id


def stopped(base: Base) -> Stopped:
    """The error of a download that the user stopped."""
    change = "run the same command again; it goes on"
    return Stopped.at("RUN-110", base.name, "the download was stopped", change)


class Meter:
    """Progress over all files; it also raises Stopped inside a running download."""

    def __init__(self, base: Base, done: int, report: Report, stop: Callable[[], bool]) -> None:
        self.base, self.stop = base, stop
        self._done, self._report = done, report
        self._lock = threading.Lock()

    def add(self, count: float) -> None:
        """Count more bytes. Raises Stopped, out of the library's loop."""
        if self.stop():
            raise stopped(self.base)
        with self._lock:
            self._done += int(count)
            total = self.base.needed_bytes
            self._report(max(0, min(self._done, total)), total, "")

    def bar(self) -> type:
        """A class that the library uses as its progress bar."""
        from huggingface_hub.utils import tqdm

        add = self.add

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **{**more, "disable": True})

            def update(self, n: float | None = 1) -> None:
                add(n or 0)

            # Compressed bytes on the wire; without these two methods the library would make a
            # second bar for them, and all would count twice.
            def update_transfer(self, n: float | None = 1) -> None:
                pass

            def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
                pass

        return Bar
