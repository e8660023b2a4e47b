"""An image from a registry, by tag or digest, every byte checked against its digest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import urllib3.exceptions

from tuning import files
from tuning.oci import layout as image
from tuning.oci.layout import ADAPTER_FILES, Blob, Image
from tuning.oci.registry.push import Progress, digest_of, is_named, manifest, tag_of
from tuning.oci.registry.wire import Remote

DEEPEST_INDEX = 3
PIECE = 1 << 18  # bytes in one read: what is lost when a download breaks off


@dataclass(frozen=True)
class Pulled:
    """What was pulled."""

    digest: str  # of what the reference names: the index's, where it names an index
    image: Image
    files: tuple[str, ...]


def pull(
    remote: Remote,
    target: Path,
    *,
    wanted: Callable[[str], bool] = ADAPTER_FILES.__contains__,
    approve: Callable[[str], None] = lambda digest: None,
    largest: int = image.LARGEST_TOTAL,
    progress: Progress = lambda done, total, note: None,
) -> Pulled:
    """Lay the files under /data of the remote's image down in the new folder `target`.

    `approve` is shown the digest before anything else is fetched, and may refuse it. `largest` is
    how many bytes may come out. Raises RefusedError for an image that is not there, damaged or
    hostile, TransientError when the registry stays away; then `target` is not made.
    """
    digest, found = remote.persist(lambda: resolve(remote))
    approve(digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    layout = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        download(remote, found.blobs, layout, progress=progress)
        options: dict[str, Any] = {"wanted": wanted, "verified": True, "largest": largest}
        names = image.unpack(found, layout, target, **options)
    finally:
        shutil.rmtree(layout, ignore_errors=True)
    return Pulled(digest, found, names)


def download(
    remote: Remote,
    blobs: Iterable[Blob],
    layout: Path,
    *,
    progress: Progress = lambda done, total, note: None,
) -> None:
    """Fetch blobs into a layout, each checked against its digest; what is there already stays."""
    blobs = tuple(blobs)
    (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    total, done = sum(blob.size for blob in blobs), 0
    for blob in blobs:

        def report(count: int, before: int = done) -> None:
            progress(before + count, total, "")

        remote.persist(partial(_download, remote, blob, layout, report))
        done += blob.size


def beginning(remote: Remote, blob: Blob, size: int) -> bytes:
    """The first bytes of a blob, at most `size`; all of a small one. They are not checked."""

    def work() -> bytes:
        wanted = min(size, blob.size)
        headers = {"Range": f"bytes=0-{wanted - 1}"}
        url = f"/blobs/{blob.digest}"
        answer = remote.request("GET", url, expect=(200, 206), headers=headers, stream=True)
        try:
            data: bytes = answer.raw.read(wanted, decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise remote.judge.unreachable(error) from None
        finally:
            answer.close()  # a server without ranges would send the rest
        return data

    return remote.persist(work)


def resolve(remote: Remote) -> tuple[str, Image]:
    """The digest that the reference names, and the image that is meant by it, both checked."""
    where = str(remote.reference)
    name = tag_of(remote.reference)
    data = _checked(remote, name)
    digest = digest_of(data)
    for _ in range(DEEPEST_INDEX):
        record = image.parse_json(data, where=where)
        if not image.is_index(record):
            return digest, image.parse_manifest(data, where=where)
        data = _checked(remote, image.choose(record, where=where).digest)
    raise image.refused(where, "has indexes within indexes")


def _checked(remote: Remote, name: str) -> bytes:
    data = manifest(remote, name)
    if data is None:
        raise remote.refusal("REG-123", f"has no image {name}", "check the name and the tag")
    if not is_named(name, data):
        raise remote.refusal("REG-143", f"sent a manifest that is not {name}", "push it again")
    return data


def _download(remote: Remote, blob: Blob, layout: Path, report: Callable[[int], None]) -> None:
    """Fetch one blob; it goes on where it broke off."""
    path = image.blob_path(layout, blob)
    if _whole(path, blob):
        return report(blob.size)
    have = path.stat().st_size if path.exists() else 0
    answer = remote.request(
        "GET",
        f"/blobs/{blob.digest}",
        expect=(200, 206, 416),
        headers={"Range": f"bytes={have}-"} if have else {},
        stream=True,
    )
    _refuse_other_size(remote, answer, blob, path)
    goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if answer.status_code != 206 or not goes_on:
        path.unlink(missing_ok=True)
        have = 0
    if answer.status_code == 416:  # its body is no part of the blob
        answer.close()
        raise remote.judge.again("REG-135", f"broke off {blob.digest}", "run it again", tries=3)
    seen = _hash(path)
    try:
        with answer, path.open("ab") as out:
            for piece in answer.raw.stream(PIECE, decode_content=False):
                have += len(piece)
                if have > blob.size:
                    break
                seen.update(piece)
                out.write(piece)
                report(have)
    except urllib3.exceptions.HTTPError as error:
        raise remote.judge.unreachable(error) from None
    if have < blob.size:
        what = f"broke off {blob.digest}"
        raise remote.judge.again("REG-135", what, "run the same command again")
    if f"sha256:{seen.hexdigest()}" != blob.digest:
        path.unlink()
        what = f"sends bytes that are not {blob.digest}"
        raise remote.refusal("REG-143", what, "look after the registry's storage, push again")


def _refuse_other_size(remote: Remote, answer: Any, blob: Blob, path: Path) -> None:
    """A blob that is shorter than its manifest says will never be whole."""
    told = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if answer.status_code == 200 and not answer.headers.get("Content-Encoding"):
        told = answer.headers.get("Content-Length", "")
    if told.isdigit() and int(told) < blob.size:
        answer.close()
        path.unlink(missing_ok=True)
        what = f"has {int(told):,} bytes of {blob.digest}, of which its manifest says {blob.size:,}"
        raise remote.refusal("REG-143", what, "push the image again")


def _whole(path: Path, blob: Blob) -> bool:
    if not path.is_file() or path.stat().st_size != blob.size:
        return False
    return f"sha256:{files.digest_file(path)}" == blob.digest


def _hash(path: Path) -> Any:
    """The sha256 of what is there of a file, to go on with."""
    if not path.exists():
        return hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
