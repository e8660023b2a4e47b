"""An image from a registry, by tag or digest, every byte checked against its digest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import urllib3.exceptions

from tuning import image
from tuning.image import ADAPTER_FILES, Blob, Image
from tuning.registry.push import Progress, digest_of, manifest, tag_of
from tuning.registry.wire import Remote

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
    progress: Progress = lambda done, total, note: None,
) -> Pulled:
    """Lay the files under /data of the remote's image down in the new folder `target`.

    Raises RefusedError for an image that is not there, damaged or hostile, TransientError when the
    registry stays away; then `target` is not made.
    """
    digest, found = remote.persist(lambda: resolve(remote))
    target.parent.mkdir(parents=True, exist_ok=True)
    layout = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (layout / "blobs" / "sha256").mkdir(parents=True)
        total, done = sum(blob.size for blob in found.blobs), 0
        for blob in found.blobs:

            def report(count: int, before: int = done) -> None:
                progress(before + count, total, "")

            remote.persist(partial(_download, remote, blob, layout, report))
            done += blob.size
        names = image.unpack(found, layout, target, wanted=wanted, verified=True)
    finally:
        shutil.rmtree(layout, ignore_errors=True)
    return Pulled(digest, found, names)


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
    if name.startswith("sha256:") and digest_of(data) != name:
        raise remote.refusal("REG-143", f"sent a manifest that is not {name}", "push it again")
    return data


def _download(remote: Remote, blob: Blob, layout: Path, report: Callable[[int], None]) -> None:
    """Fetch one blob; it goes on where it broke off."""
    path = image.blob_path(layout, blob)
    have = path.stat().st_size if path.exists() else 0
    answer = remote.request(
        "GET",
        f"/blobs/{blob.digest}",
        expect=(200, 206, 416),
        headers={"Range": f"bytes={have}-"} if have else {},
        stream=True,
    )
    goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if answer.status_code != 206 or not goes_on:
        path.unlink(missing_ok=True)
        have = 0
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


def _hash(path: Path) -> Any:
    """The sha256 of what is there of a file, to go on with."""
    if not path.exists():
        return hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
