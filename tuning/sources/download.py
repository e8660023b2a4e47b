"""One URL -> one verified file, resumed after every interruption.

Bytes are received in a `part`, which records how many of them are safe on disk and to which version
of the file they belong (Range, If-Range). Only a complete and checked file gets its name: the
invariants are those of `network.answer`. Nothing is decoded here.
"""

from __future__ import annotations

import os
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from urllib3.exceptions import HTTPError, ReadTimeoutError

from tuning import files
from tuning.console import Report
from tuning.errors import DataError, Problem, RefusedError, Stopped, TransientError
from tuning.network.answer import NotHttp, is_open_ended
from tuning.network.policy import Policy
from tuning.network.retry import Again, Attempts
from tuning.network.session import Response
from tuning.sources.http import Item, Limits, Web, broken, empty, not_http, validate
from tuning.sources.part import Part

CHUNK = 1 << 20
DURABLE_EVERY = 64 << 20  # bytes between two fsyncs of a part
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body|script|!--|\?xml)", re.I)


class Aborted(Exception):
    """Another file failed for good; the bytes received so far are kept for the next run."""


class Meter:
    """Shared by all downloads of one fetch: progress, disk space, and the signal to stop."""

    def __init__(
        self, folder: Path, limits: Limits, report: Report, stop: Callable[[], bool]
    ) -> None:
        self.folder, self.limits = folder, limits
        self.failed = threading.Event()
        self._report, self._stop = report, stop
        self._deadline = time.monotonic() + limits.total
        self._lock = threading.Lock()
        self._have: dict[int, int] = {}
        self._length: dict[int, int | None] = {}

    def expect(self, index: int, length: int | None = None) -> None:
        """Download `index` will have `length` bytes (None: unknown)."""
        with self._lock:
            self._length[index] = length
            self._have.setdefault(index, 0)

    def have(self, index: int, count: int) -> None:
        """`count` bytes of download `index` are received."""
        with self._lock:
            self._have[index] = count
            known = [n for n in self._length.values() if n is not None]
            total = sum(known) if len(known) == len(self._length) else None
            done, parts = sum(self._have.values()), len(self._length)
            self._report(done, total, f"{parts} files" if parts > 1 else "")

    def claims(self, policy: Policy) -> tuple[int, bool]:
        """Bytes still expected, as far as known, and whether all files exceed the limit."""
        with self._lock:
            sizes = {i: max(self._length[i] or 0, have) for i, have in self._have.items()}
            missing = sum(size - self._have[i] for i, size in sizes.items())
            return missing, sum(sizes.values()) > policy.max_total_bytes

    def check(self, *, receiving: bool = False) -> None:
        """Raise Stopped, Aborted or TransientError if the download must end early."""
        if self._stop():
            raise Stopped.at(
                "RUN-110", "input", "stopped", "run the same command again; it goes on"
            )
        if self.failed.is_set() and receiving:
            raise Aborted
        if time.monotonic() > self._deadline:
            what = f"not finished after {self.limits.total:.0f} s"
            raise TransientError.at("FETCH-137", "input", what, "run the same command again")

    def sleep(self, seconds: float) -> None:
        """Wait, unless stopped meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.failed.is_set():
            self.check()
            time.sleep(min(left, 0.1))


def download(item: Item, target: Path, web: Web, meter: Meter) -> tuple[str, int]:
    """Fetch `item` to `target`; returns the sha256 and the size in bytes of the file.

    Raises SpecError, RefusedError, DataError, TransientError or Stopped, and Aborted if another
    download failed for good.
    """
    part = target.with_name(target.name + ".part")
    attempts, best = Attempts(replace(web.limits.retry, sleep=meter.sleep)), -1
    while True:
        try:
            return _attempt(item, target, web, meter)
        except OSError as error:  # a full disk does not say which
            error.filename = error.filename or str(part)
            raise
        except Again as again:
            size = part.stat().st_size if part.exists() else 0
            if size > best:  # progress: no reason to give up
                best = size
                attempts.reset()
            attempts.wait(again, give_up=meter.failed.is_set())


def _attempt(item: Item, target: Path, web: Web, meter: Meter) -> tuple[str, int]:
    """One request and its answer."""
    meter.check()
    part = Part.open(target, item)
    response = web.get(item, part.headers())
    try:
        validate(item, response)
        end = _take_up(item, response, part)
        if response.status != 416:
            _check_size(item, part, web.policy, meter)
            _receive(item, response, part, end, web, meter)
        closed_end = response.status == 200 and is_open_ended(response.headers)
    finally:
        response.close()
    return _finish(item, target, part, closed_end=closed_end)


def _take_up(item: Item, response: Response, part: Part) -> int | None:
    """The size of the part at the end of this answer's body, None if that is not announced.

    Raises Again, with an empty part, for an answer that does not continue it.
    """
    try:
        match response.status:
            case 206:
                if end := part.continued_by(response.headers):
                    return end
            case 416:
                if part.completed_by(response.headers):
                    return part.size
            case _:
                return part.begin(response.headers)
    except NotHttp as fault:
        part.restart()
        raise not_http(item, fault) from None
    part.restart()
    raise Again(_changed(item), after=0)


def _changed(item: Item) -> Problem:
    what = "the file changes while it is downloaded"
    return Problem("FETCH-138", item.where, what, "run the same command again when it is at rest")


def _check_size(item: Item, part: Part, policy: Policy, meter: Meter) -> None:
    """Refuse a file that is announced as too large, before reading it."""
    if part.length is not None:
        _check_cap(item, part.length, policy)
    meter.expect(item.index, part.length)
    meter.have(item.index, part.size)
    missing, over = meter.claims(policy)
    if over:
        raise _too_large(item, "all files together have", policy.max_total_bytes, "maxTotalSize")
    instead = "use another run directory"
    files.require_space(meter.folder, missing, code="FETCH-136", where=item.where, instead=instead)


def _check_cap(item: Item, size: int, policy: Policy) -> None:
    if size > policy.max_file_bytes:
        raise _too_large(item, "has", policy.max_file_bytes, "maxFileSize")


def _too_large(item: Item, who: str, cap: int, key: str) -> DataError:
    what = f"{who} more than {cap:,} bytes"
    return DataError.at("FETCH-122", item.where, what, f"use less data, or raise data.{key}")


def _receive(
    item: Item, response: Response, part: Part, end: int | None, web: Web, meter: Meter
) -> None:
    """Append the body to the part, up to `end` if known. Raises Again where it breaks off."""
    pace = _Pace(item, part, web.limits)
    durable = part.size
    with part.path.open("r+b" if part.size else "wb") as file:
        file.seek(part.size)
        try:
            while piece := response.read1(CHUNK):
                file.write(piece)
                part.size += len(piece)
                meter.check(receiving=part.size > CHUNK)  # a small file is completed
                meter.have(item.index, part.size)
                _check_cap(item, part.size, web.policy)
                if meter.claims(web.policy)[1]:
                    cap = web.policy.max_total_bytes
                    raise _too_large(item, "all files together have", cap, "maxTotalSize")
                if part.size - durable >= DURABLE_EVERY:
                    durable = part.size
                    _keep(file, part)
                pace.check()
        except ReadTimeoutError:
            if part.size != end:  # else the server only did not close
                what = f"no byte for {web.limits.stall:.0f} s, at byte {part.size}"
                change = "run the same command again; it goes on"
                raise Again(Problem("FETCH-133", item.where, what, change)) from None
        except (HTTPError, ssl.SSLError, ConnectionError):
            raise broken(item, part.size, end) from None
        finally:
            _keep(file, part)
    size, expected = part.size, part.length if part.size == end else end
    if expected is None or size == expected:
        return
    if size > expected:  # none of it can be trusted
        part.restart()
    raise broken(item, size, expected)


class _Pace:
    """Whether bytes come fast enough."""

    def __init__(self, item: Item, part: Part, limits: Limits) -> None:
        self._item, self._part, self._limits = item, part, limits
        self._since, self._mark = time.monotonic(), part.size

    def check(self) -> None:
        """Raise Again if too few bytes came in the last window."""
        seconds, count = time.monotonic() - self._since, self._part.size - self._mark
        if seconds < self._limits.slow_window:
            return
        if count < self._limits.slow_bytes:
            what = f"only {count} bytes came in {seconds:.0f} s"
            change = "run the same command again; it goes on"
            raise Again(Problem("FETCH-134", self._item.where, what, change))
        self._since, self._mark = time.monotonic(), self._part.size


def _keep(file: Any, part: Part) -> None:
    """Flush the part to disk, then record its size."""
    file.flush()
    os.fsync(file.fileno())
    part.save()


def _finish(item: Item, target: Path, part: Part, *, closed_end: bool) -> tuple[str, int]:
    """Validate the complete part and give it its name."""
    if part.size == 0:
        raise empty(item)
    if part.path.stat().st_size != part.size:
        part.discard()
        raise broken(item, 0, part.size)
    with part.path.open("rb") as file:
        head = file.read(1024)
    if _PAGE.match(head):
        what = f'got an HTML or XML page (first bytes "{_printable(head)}") instead of data'
        change = (
            "the link has probably expired or needs a login: make a new signed URL, "
            "or give the host's credentials"
        )
        part.discard()
        raise RefusedError.at("FETCH-112", item.where, what, change)
    sha256 = files.digest_file(part.path)
    if item.sha256 and sha256 != item.sha256:
        part.discard()
        what = f"its sha256 is {sha256}, not {item.sha256}"
        change = "check which of the two is right: the file or the #sha256= of its URL"
        if item.name:
            change = "run the same command again; if it stays so, the hub's copy is damaged"
        raise Again(Problem("FETCH-121", item.where, what, change), tries=2, final=DataError)
    if item.size not in (None, part.size) and not part.encoding:
        size = part.size
        part.discard()
        what = f"has {size:,} bytes, and the hub lists {item.size:,}"
        change = "run the same command again; if it stays so, the hub's copy is damaged"
        raise Again(Problem("FETCH-121", item.where, what, change), tries=2, final=DataError)
    if closed_end and not item.sha256:
        what = (
            f"the server does not announce the length, so a truncated copy would go unnoticed; "
            f"{part.size} bytes came, with sha256 {sha256}"
        )
        change = f"if that is the whole file, add #sha256={sha256} to the URL"
        part.discard()
        raise RefusedError.at("FETCH-119", item.where, what, change)
    part.path.replace(target)
    files.sync_folder(target.parent)
    part.record.unlink(missing_ok=True)
    return sha256, part.size


def _printable(head: bytes) -> str:
    text = " ".join(head[:80].decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() and c not in "\"'" else "_" for c in text)[:40]
