"""Upload the missing blobs of an image; in doubt a blob is sent again from its start.

Registries lose uploads together with the reply, and some accept a piece at a wrong offset silently.
So no piece is sent twice into the same upload, and the push checks every blob again at its end.
Several blobs are uploaded concurrently, each with its own retries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from tuning import files
from tuning.console import Report
from tuning.errors import RefusedError, SpecError
from tuning.network.retry import Again
from tuning.network.session import Response
from tuning.oci.layout.manifest import Blob, blob_path
from tuning.oci.registry.answers import Reply
from tuning.oci.registry.wire import Remote
from tuning.threads import side_by_side

AT_ONCE = 4  # blobs
PIECE = 1 << 18  # bytes in one send: at 1 KiB/s still within the time-out of 300 s
DOUBTFUL = (400, 404, 416)  # the upload is lost or damaged
UNTOLD = (400, 401, 403, 405, 406, 410, 416, 501)  # nothing is known of the blob
NO_PIECES = (405, 411, 415, 501)
_EMPTY = {"Content-Length": "0"}
Sent = Callable[[int], None]  # bytes of one blob so far


def blobs(
    remote: Remote,
    layout: Path,
    wanted: Iterable[Blob],
    *,
    progress: Report,
) -> int:
    """Upload the missing ones of `wanted`; gives the bytes sent.

    Raises RefusedError, TransientError, or SpecError for a layout that is damaged.
    """
    wanted = tuple(wanted)
    tally = _Tally(wanted, progress)
    failed = threading.Event()

    def upload(blob: Blob) -> int:
        try:
            work = partial(_blob, remote, layout, blob, tally.of(blob))
            return remote.persist(work, unless=failed.is_set)
        except BaseException:
            failed.set()
            raise

    # The first goes alone: what refuses one blob refuses all. The others all end before this
    # function does, whatever happens to one: no upload goes on behind a second try.
    results: list[int | BaseException] = [upload(blob) for blob in wanted[:1]]
    results += side_by_side([partial(upload, blob) for blob in wanted[1:]], at_once=AT_ONCE)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return sum(count for count in results if isinstance(count, int))


class _Tally:
    """The progress of several blobs as one."""

    def __init__(self, wanted: tuple[Blob, ...], progress: Report) -> None:
        self._progress, self._total = progress, sum(blob.size for blob in wanted)
        self._done, self._reported = dict.fromkeys(wanted, 0), 0
        self._lock = threading.Lock()

    def of(self, blob: Blob) -> Sent:
        """The progress callback for `blob`; the total never goes down when a blob starts again."""

        def report(count: int) -> None:
            with self._lock:
                self._done[blob] = count
                self._reported = max(self._reported, sum(self._done.values()))
                self._progress(self._reported, self._total, "")

        return report


def has(remote: Remote, blob: Blob) -> bool | None:
    """Whether the repository has the blob, at its full size if it says a size.

    None if it does not say: it refuses both HEAD (a store that signs addresses for GET alone does)
    and its first byte.
    """
    if remote.head:
        answer = remote.request("HEAD", f"/blobs/{blob.digest}", expect=(200, 404, *UNTOLD))
        if answer.status not in UNTOLD:
            size = answer.headers.get("Content-Length", str(blob.size))
            return answer.status == 200 and size == str(blob.size)
        remote.head = False
    part = {"Range": "bytes=0-0"}
    answer = remote.request(
        "GET", f"/blobs/{blob.digest}", expect=(200, 206, 404, *UNTOLD), headers=part, stream=True
    )
    answer.close()  # a store without ranges would send the rest
    if answer.status in UNTOLD:
        return None
    told = answer.headers.get("Content-Range" if answer.status == 206 else "Content-Length", "")
    size = told.rpartition("/")[2].strip()
    return answer.status != 404 and (not size.isdecimal() or size == str(blob.size))


def begin(remote: Remote) -> str:
    """Begin an upload; returns the URL to continue at."""
    answer = remote.request("POST", "/blobs/uploads/", expect=(202,), headers=_EMPTY)
    return _next(remote, answer, "")


def _mount(remote: Remote, blob: Blob) -> str | None:
    """Mount the blob from the registry's repository `mount_from`, without sending a byte.

    Returns None, or the URL of an upload that the registry began instead.
    """
    query = urlencode({"mount": blob.digest, "from": remote.mount_from}, safe=":/")
    try:
        answer = remote.request(
            "POST",
            f"/blobs/uploads/?{query}",
            expect=(201, 202, *range(400, 500)),
            headers=_EMPTY,
            also=remote.mount_from,
        )
    except RefusedError:  # no right to read there: upload the blob
        answer = None
    if answer is None or answer.status >= 400:
        remote.tokens.forget(remote.mount_from)
        return begin(remote)
    return None if answer.status == 201 else _next(remote, answer, "")


def _blob(remote: Remote, layout: Path, blob: Blob, report: Sent) -> int:
    """Upload one blob if it is missing; returns the bytes sent. Safe to repeat."""
    url = None
    if not has(remote, blob):
        url = _mount(remote, blob) if remote.mount_from else begin(remote)
    if url is None:
        report(blob.size)
        return 0
    path, start = blob_path(layout, blob), 0
    if remote.in_pieces and blob.size > remote.chunk:
        with remote.lock:
            remote.in_pieces -= 1  # given back on success
        ended = _pieces(remote, url, path, blob, report)
        with remote.lock:
            remote.in_pieces = remote.in_pieces + 1 if ended else 0
        url, start = (ended, blob.size) if ended else (begin(remote), 0)
    answer = remote.request(
        "PUT",
        f"{url}{'&' if '?' in url else '?'}digest={blob.digest}",
        expect=(200, 201, 204, *DOUBTFUL),
        body=partial(_Body, path, start, blob.size, report),
        headers=_headers(blob.size - start),
    )
    if answer.status in DOUBTFUL:
        if f"sha256:{files.digest_file(path)}" != blob.digest:
            what, change = "is damaged", "remove the layout folder and run the same command again"
            raise SpecError.at("IMAGE-105", str(path), what, change)
        raise _doubt(remote, blob, answer)
    return blob.size


def _pieces(remote: Remote, url: str, path: Path, blob: Blob, report: Sent) -> str | None:
    """Send the blob in pieces; returns the final URL, None if the registry takes no pieces."""
    for start in range(0, blob.size, remote.chunk):
        end = min(start + remote.chunk, blob.size)
        answer = remote.request(
            "PATCH",
            url,
            expect=(200, 201, 202, 204, *DOUBTFUL, *NO_PIECES),
            body=partial(_Body, path, start, end, report),
            headers=_headers(end - start) | {"Content-Range": f"{start}-{end - 1}"},
        )
        if answer.status in NO_PIECES and start == 0:
            return None
        held = answer.headers.get("Range", "").removeprefix("bytes=")
        if answer.status >= 400 or held not in ("", f"0-{end - 1}"):
            raise _doubt(remote, blob, answer)
        url = _next(remote, answer, url)
    return url


def _headers(size: int) -> dict[str, str]:
    return {"Content-Type": "application/octet-stream", "Content-Length": str(size)}


def _next(remote: Remote, answer: Response, url: str) -> str:
    location = answer.headers.get("Location")
    if not location and not url:
        what, change = "begins an upload without saying where", "tell the registry's administrator"
        raise remote.errors.refusal("REG-125", what, change)
    return remote.absolute(location, answer.url or "") if location else url


def _doubt(remote: Remote, blob: Blob, answer: Response) -> Again:
    reply = Reply.of(answer)
    what = f"lost the upload of {blob.digest} (it answered {reply.status}{reply.quoted})"
    return remote.errors.again("REG-134", what, "run the same command again", tries=4)


class _Body:
    """A range of a file as a request's body, read as it is sent, with progress."""

    def __init__(self, path: Path, start: int, end: int, report: Sent) -> None:
        self._path, self._start, self._end, self._report = path, start, end, report

    def __len__(self) -> int:
        return self._end - self._start

    def __iter__(self) -> Iterator[bytes]:
        position = self._start
        with self._path.open("rb") as file:
            file.seek(position)
            while piece := file.read(min(PIECE, self._end - position)):
                yield piece
                position += len(piece)
                self._report(position)
