"""An image from a registry, by tag or digest, every byte checked against its digest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from urllib3.exceptions import HTTPError

from tuning import files
from tuning.console import Report
from tuning.errors import TransientError
from tuning.network.answer import (
    NotHttp,
    body_range,
    content_length,
    content_range,
    is_chunked,
)
from tuning.network.session import Response
from tuning.oci.layout.extract import LARGEST_TOTAL, unpack
from tuning.oci.layout.manifest import (
    Blob,
    Image,
    blob_path,
    choose_manifest,
    is_index,
    parse_json,
    parse_manifest,
    refused,
)
from tuning.oci.layout.package import ADAPTER_FILES
from tuning.oci.registry.push import damaged, digest_of, manifest, tag_of
from tuning.oci.registry.wire import Remote
from tuning.sources.local import stored

DEEPEST_INDEX = 3
PIECE = 1 << 18  # bytes in one read, lost when a download breaks off


@dataclass(frozen=True)
class Pulled:
    """A pulled image."""

    digest: str  # that the reference names; an index has its own
    image: Image
    files: tuple[str, ...]


def pull(
    remote: Remote,
    target: Path,
    *,
    wanted: Callable[[str], bool] = ADAPTER_FILES.__contains__,
    approve: Callable[[str], None] = lambda digest: None,
    largest: int = LARGEST_TOTAL,
    progress: Report = lambda done, total, note: None,
) -> Pulled:
    """Lay the files under /data of the remote's image down in the new folder `target`.

    `approve` gets the digest before anything else is fetched and may raise. `largest`: limit of
    unpacked bytes. Raises RefusedError for an image that is missing, damaged or malicious,
    TransientError for an unreachable registry; then `target` is not made.
    """
    digest, image = remote.persist(lambda: resolve(remote))
    approve(digest)
    with stored(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        layout = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        download(remote, image.blobs, layout, progress=progress)
        options: dict[str, Any] = {"wanted": wanted, "verified": True, "largest": largest}
        names = unpack(image, layout, target, **options)
    finally:
        shutil.rmtree(layout, ignore_errors=True)
    return Pulled(digest, image, names)


def download(
    remote: Remote,
    blobs: Iterable[Blob],
    layout: Path,
    *,
    progress: Report = lambda done, total, note: None,
) -> None:
    """Fetch the missing blobs into a layout, each checked against its digest."""
    with stored(layout):
        _fetch(remote, tuple(blobs), layout, progress)


def _fetch(remote: Remote, blobs: tuple[Blob, ...], layout: Path, progress: Report) -> None:
    (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    total, done = sum(blob.size for blob in blobs), 0
    missing = sum(max(0, blob.size - _size(blob_path(layout, blob))) for blob in blobs)
    files.require_space(
        layout.parent,
        missing,
        code="REG-137",
        where=str(remote.reference),
        instead="use a folder on a larger disk",
        error=TransientError,
    )
    for blob in blobs:

        def report(count: int, before: int = done) -> None:
            progress(before + count, total, "")

        remote.persist(partial(_download, remote, blob, layout, report))
        done += blob.size


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def beginning(remote: Remote, blob: Blob, size: int) -> bytes:
    """The first bytes of a blob, at most `size`; all of a small one. They are not checked."""

    def work() -> bytes:
        wanted = min(size, blob.size)
        headers = {"Range": f"bytes=0-{wanted - 1}"}
        url = f"/blobs/{blob.digest}"
        answer = remote.request("GET", url, expect=(200, 206), headers=headers, stream=True)
        try:
            data: bytes = answer.read(wanted, decode_content=False)
        except HTTPError as error:
            raise remote.errors.unreachable(error) from None
        finally:
            answer.close()  # a server without ranges would send the rest
        return data

    return remote.persist(work)


def resolve(remote: Remote) -> tuple[str, Image]:
    """The digest that the reference names and the image to use of it, both checked."""
    where = str(remote.reference)
    name = tag_of(remote.reference)
    data = _present(remote, name)
    remote.check_json(data)
    digest = digest_of(data)
    for _ in range(DEEPEST_INDEX):
        record = parse_json(data, where=where)
        if not is_index(record):
            return digest, parse_manifest(data, where=where)
        data = _present(remote, choose_manifest(record, where=where).digest)
    raise refused(where, "has too deeply nested indexes")


def _present(remote: Remote, name: str) -> bytes:
    data = manifest(remote, name)
    if data is None:
        change = "check the name and the tag"
        raise remote.errors.refusal("REG-123", f"has no image {name}", change)
    return data


def _download(remote: Remote, blob: Blob, layout: Path, report: Callable[[int], None]) -> None:
    """Fetch one blob, resuming a partial file."""
    path = blob_path(layout, blob)
    if _whole(path, blob):
        return report(blob.size)
    have = _size(path)
    answer = remote.request(
        "GET",
        f"/blobs/{blob.digest}",
        expect=(200, 206, 416),
        headers={"Range": f"bytes={have}-"} if have else {},
        stream=True,
    )
    if not _goes_on(remote, answer, blob, path, have):
        path.unlink(missing_ok=True)
        have = 0
    if answer.status == 416:  # its body is not part of the blob
        answer.close()
        raise remote.errors.again("REG-135", f"broke off {blob.digest}", "run it again", tries=3)
    seen = _hash(path)
    try:
        with closing(answer), path.open("ab") as out:
            while piece := answer.read1(PIECE, decode_content=False):
                have += len(piece)
                if have > blob.size:
                    break
                seen.update(piece)
                out.write(piece)
                report(have)
    except HTTPError as error:
        raise remote.errors.unreachable(error) from None
    if have < blob.size:
        what = f"broke off {blob.digest}"
        raise remote.errors.again("REG-135", what, "run the same command again")
    if f"sha256:{seen.hexdigest()}" != blob.digest:
        path.unlink()
        raise damaged(remote, f"sends bytes that are not {blob.digest}")


def _goes_on(remote: Remote, answer: Response, blob: Blob, path: Path, have: int) -> bool:
    """Whether the body continues the `have` bytes that are here.

    Raises Again for an answer that HTTP does not allow, RefusedError if the blob is shorter than
    its manifest says.
    """
    headers = answer.headers
    try:
        is_chunked(headers)
        part, size = content_range(headers), content_length(headers)
        start = body_range(headers).start if answer.status == 206 else None
    except NotHttp as fault:
        answer.close()
        path.unlink(missing_ok=True)
        raise remote.errors.not_http(f"its answer {fault}") from None
    if answer.status != 200 or headers.get("Content-Encoding"):
        size = part.total if part is not None else None
    if size is not None and size < blob.size:
        answer.close()
        path.unlink(missing_ok=True)
        what = f"has {size:,} bytes of {blob.digest}, but its manifest says {blob.size:,}"
        raise damaged(remote, what)
    return start == have


def _whole(path: Path, blob: Blob) -> bool:
    if not path.is_file() or path.stat().st_size != blob.size:
        return False
    return f"sha256:{files.digest_file(path)}" == blob.digest


def _hash(path: Path) -> Any:
    """The sha256 of a partial file, to continue with."""
    if not path.exists():
        return hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
