"""One URL -> one verified file, however often the way to it breaks.

The bytes arrive in `NAME.part`, with `NAME.part.json` beside it saying how many of them are safe on
the disk and which version of the file they belong to, so that a broken download goes on where it
was (Range, If-Range). Only a complete and checked file gets its name. Nothing is ever decoded here.
"""

from __future__ import annotations

import logging
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from urllib3 import exceptions as web_errors

from tuning import files
from tuning.errors import DataError, Problem, RefusedError, Stopped, TransientError
from tuning.network.policy import Policy
from tuning.sources.http import Again, Item, Patience, Web, empty, judge

log = logging.getLogger(__name__)

Report = Callable[[float, float | None, str], None]  # bytes done, bytes in all if known, note

CHUNK = 1 << 20
DURABLE_EVERY = 64 << 20  # bytes between two fsyncs of a part
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|body|script|!--|\?xml)", re.I)
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class Enough(Exception):
    """Another URL cannot be had: what is here is kept for the next run."""


class Meter:
    """What all downloads of one fetch share: progress, room on the disk, and the signal to end."""

    def __init__(
        self, folder: Path, patience: Patience, report: Report, stop: Callable[[], bool]
    ) -> None:
        self.folder, self.patience = folder, patience
        self.doomed = threading.Event()
        self._report, self._stop = report, stop
        self._deadline = time.monotonic() + patience.total
        self._lock = threading.Lock()
        self._have: dict[int, int] = {}
        self._length: dict[int, int | None] = {}

    def expect(self, index: int, length: int | None = None) -> None:
        """Download `index` will end at `length` bytes (None: nobody knows)."""
        with self._lock:
            self._length[index] = length
            self._have.setdefault(index, 0)

    def have(self, index: int, count: int) -> None:
        """`count` bytes of download `index` are here."""
        with self._lock:
            self._have[index] = count
            known = [n for n in self._length.values() if n is not None]
            total = sum(known) if len(known) == len(self._length) else None
            done, parts = sum(self._have.values()), len(self._length)
            self._report(done, total, f"{parts} files" if parts > 1 else "")

    def claims(self, policy: Policy) -> tuple[int, bool]:
        """Bytes still to come as far as known, and whether all files together break the cap."""
        with self._lock:
            sizes = {i: max(self._length[i] or 0, have) for i, have in self._have.items()}
            missing = sum(size - self._have[i] for i, size in sizes.items())
            return missing, sum(sizes.values()) > policy.max_total_bytes

    def look(self, *, receiving: bool = False) -> None:
        """The point where a download may end early: stopped, out of time, or not needed."""
        if self._stop():
            raise Stopped.at(
                "RUN-110", "input", "stopped", "run the same command again; it goes on"
            )
        if self.doomed.is_set() and receiving:
            raise Enough
        if time.monotonic() > self._deadline:
            what = f"not finished after {self.patience.total:.0f} s"
            raise TransientError.at("FETCH-137", "input", what, "run the same command again")

    def sleep(self, seconds: float) -> None:
        """Wait, but not past a stop."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.doomed.is_set():
            self.look()
            time.sleep(min(left, 0.1))


def download(item: Item, target: Path, web: Web, meter: Meter) -> tuple[str, int]:
    """Fetch `item` to `target`; the sha256 and the size in bytes of the file.

    Raises SpecError, RefusedError, DataError, TransientError or Stopped; Enough if another download
    failed for good.
    """
    patience = web.patience
    part = target.with_name(target.name + ".part")
    tries, best, since = 0, -1, time.monotonic()
    while True:
        try:
            return _attempt(item, target, web, meter)
        except OSError as error:  # a full disk does not say which
            error.filename = error.filename or str(part)
            raise
        except Again as again:
            size = part.stat().st_size if part.exists() else 0
            if size > best:  # it got further than ever: no reason to give up
                tries, best, since = 0, size, time.monotonic()
            tries += 1
            over = time.monotonic() - since > patience.retrying
            if over or tries >= (again.tries or patience.tries) or meter.doomed.is_set():
                raise again.final([again.problem]) from None
            wait = min(patience.backoff_cap, patience.backoff * 2 ** (tries - 1))
            delay = random.uniform(0, wait) if again.after is None else again.after  # noqa: S311
            log.info("%s; trying again in %.1f s", again.problem, delay)
            meter.sleep(min(delay, patience.retry_after_cap))


def _attempt(item: Item, target: Path, web: Web, meter: Meter) -> tuple[str, int]:
    """One request, and what comes of it."""
    meter.look()
    part = _Part.open(target, item)
    response = web.get(item, part.headers())
    try:
        judge(item, response)
        if response.status == 416 and not part.complete_at(response):
            part.restart(response)
            raise Again(_changed(item), after=0)
        if response.status != 416:
            if response.status == 206 and not part.continued_by(response):
                part.restart(response)
                raise Again(_changed(item), after=0)
            if response.status != 206:
                part.restart(response)
            _check_size(item, part, web.policy, meter)
            _receive(item, response, part, web, meter)
    finally:
        response.close()
    return _finish(item, target, part, closed_end=_open_ended(response))


def _changed(item: Item) -> Problem:
    what = "the file changes while it is downloaded"
    return Problem("FETCH-138", item.where, what, "run the same command again when it is at rest")


@dataclass
class _Part:
    """The bytes that are here, and which version of which file they are."""

    path: Path
    item: Item
    size: int = 0
    validator: str | None = None  # a strong ETag, or Last-Modified
    modified: str | None = None  # Last-Modified, in any case
    length: int | None = None  # of the whole file

    @classmethod
    def open(cls, target: Path, item: Item) -> _Part:
        """The part as the last attempt left it; what may not have reached the disk is cut off."""
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
        return self.path.with_name(self.path.name + ".json")

    def headers(self) -> dict[str, str]:
        """What to ask for: the rest, if what is here can be told from another version."""
        if not self.size or not (self.validator or self.item.sha256):
            self.size = 0
            return {}
        condition = {"If-Range": self.validator} if self.validator else {}
        return {"Range": f"bytes={self.size}-", **condition}

    def restart(self, response: urllib3.BaseHTTPResponse) -> None:
        """Begin again, with the version that `response` announces."""
        self.record.unlink(missing_ok=True)
        self.size, self.validator = 0, _validator(response)
        self.modified = response.headers.get("last-modified")
        length = response.headers.get("content-length", "")
        self.length = int(length) if length.isdigit() and response.status == 200 else None

    def continued_by(self, response: urllib3.BaseHTTPResponse) -> bool:
        """True if the body of this 206 is the rest of what is here."""
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

    def complete_at(self, response: urllib3.BaseHTTPResponse) -> bool:
        """True if this 416 says that nothing is missing."""
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        return bool(match and self.size and match[3] == str(self.size))

    def save(self) -> None:
        """Remember `size` bytes, once they are on the disk."""
        state = {
            "url": self.item.key,
            "size": self.size,
            "validator": self.validator,
            "modified": self.modified,
            "length": self.length,
        }
        files.write_json(self.record, state)


def _validator(response: urllib3.BaseHTTPResponse) -> str | None:
    etag = response.headers.get("etag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("last-modified")


def _open_ended(response: urllib3.BaseHTTPResponse) -> bool:
    """True if the end of the body is marked by nothing but the end of the connection."""
    chunked = "chunked" in response.headers.get("transfer-encoding", "").lower()
    return response.status == 200 and not chunked and "content-length" not in response.headers


def _check_size(item: Item, part: _Part, policy: Policy, meter: Meter) -> None:
    """Refuse what is too large by its own word, before any of it is read."""
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
    item: Item, response: urllib3.BaseHTTPResponse, part: _Part, web: Web, meter: Meter
) -> None:
    """Append the body to the part, up to its end. Raises Again where it breaks off."""
    patience, window, mark = web.patience, time.monotonic(), part.size
    announced = _announced(response, part)
    durable = part.size
    with part.path.open("r+b" if part.size else "wb") as file:
        file.seek(part.size)
        try:
            while piece := response.read1(CHUNK):
                file.write(piece)
                part.size += len(piece)
                meter.look(receiving=part.size > CHUNK)  # a small file may as well end
                meter.have(item.index, part.size)
                _check_cap(item, part.size, web.policy)
                if meter.claims(web.policy)[1]:
                    cap = web.policy.max_total_bytes
                    raise _too_large(item, "all files together have", cap, "maxTotalSize")
                if part.size - durable >= DURABLE_EVERY:
                    durable = part.size
                    _keep(file, part)
                now = time.monotonic()
                if now - window >= patience.slow_window:
                    if part.size - mark < patience.slow_bytes:
                        what = f"only {part.size - mark} bytes came in {now - window:.0f} s"
                        change = "run the same command again; it goes on"
                        raise Again(Problem("FETCH-134", item.where, what, change))
                    window, mark = now, part.size
        except web_errors.ReadTimeoutError:
            if part.size != announced:  # else it only forgot to close
                what = f"no byte for {patience.stall:.0f} s, at byte {part.size}"
                change = "run the same command again; it goes on"
                raise Again(Problem("FETCH-133", item.where, what, change)) from None
        except (web_errors.HTTPError, ssl.SSLError, ConnectionError):
            raise Again(_cut(item, part.size, announced)) from None
        finally:
            _keep(file, part)
    if announced is not None and part.size != announced:
        problem = _cut(item, part.size, announced)
        if part.size > announced:  # nothing of it can be trusted
            part.size = 0
            part.save()
        raise Again(problem)


def _announced(response: urllib3.BaseHTTPResponse, part: _Part) -> int | None:
    """The size in bytes that the part must have at the end of this body."""
    length = response.headers.get("content-length", "")
    if length.isdigit() and "transfer-encoding" not in response.headers:
        return part.size + int(length)
    return part.length


def _keep(file: Any, part: _Part) -> None:
    """Bring what was written to the disk, then say so."""
    file.flush()
    os.fsync(file.fileno())
    part.save()


def _cut(item: Item, size: int, announced: int | None) -> Problem:
    of = f" of {announced}" if announced is not None else ""
    what = f"the transfer ended after {size}{of} bytes"
    return Problem("FETCH-135", item.where, what, "run the same command again; it goes on")


def _finish(item: Item, target: Path, part: _Part, *, closed_end: bool) -> tuple[str, int]:
    """Judge the complete part and give it its name."""
    if part.size == 0:
        raise empty(item)
    with part.path.open("rb") as file:
        head = file.read(1024)
    if _PAGE.match(head):
        what = f'got an HTML or XML page (first bytes "{_printable(head)}"), wanted data'
        change = (
            "the link has probably expired or needs a login: make a new signed URL, "
            "or give the host's credentials"
        )
        _discard(part)
        raise RefusedError.at("FETCH-112", item.where, what, change)
    sha256 = files.digest_file(part.path)
    if item.sha256 and sha256 != item.sha256:
        _discard(part)
        what = f"its sha256 is {sha256}, not {item.sha256}"
        change = "check which of the two is right: the file or the #sha256= of its URL"
        raise Again(Problem("FETCH-121", item.where, what, change), tries=2, final=DataError)
    if closed_end and not item.sha256:
        what = (
            f"the server does not say how long the file is, so that a cut copy would not show; "
            f"{part.size} bytes came, with sha256 {sha256}"
        )
        change = f"if that is all of it, add #sha256={sha256} to the URL"
        _discard(part)
        raise RefusedError.at("FETCH-119", item.where, what, change)
    part.path.replace(target)
    files.sync_folder(target.parent)
    part.record.unlink(missing_ok=True)
    return sha256, part.size


def _discard(part: _Part) -> None:
    part.path.unlink(missing_ok=True)
    part.record.unlink(missing_ok=True)


def _printable(head: bytes) -> str:
    text = " ".join(head[:80].decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() and c not in "\"'" else "_" for c in text)[:40]
