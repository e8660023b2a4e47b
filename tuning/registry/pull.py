"""An image from a registry, by tag or digest, every byte checked against its digest."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from tuning import files, image
from tuning.errors import Problem
from tuning.image import ADAPTER_FILES, Blob, Image
from tuning.registry.push import CHUNK, INDEXES, Progress, manifest
from tuning.registry.wire import Again, Remote


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
    digest, found = remote.persist(lambda: _resolve(remote))
    target.parent.mkdir(parents=True, exist_ok=True)
    layout = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (layout / "blobs" / "sha256").mkdir(parents=True)
        blobs = (found.config, *found.layers)
        total, done = sum(blob.size for blob in blobs), 0
        for blob in blobs:

            def report(count: int, before: int = done) -> None:
                progress(before + count, total, "")

            remote.persist(partial(_download, remote, blob, layout, report))
            done += blob.size
        names = image.unpack(found, layout, target, wanted=wanted)
    finally:
        shutil.rmtree(layout, ignore_errors=True)
    return Pulled(digest, found, names)


def _resolve(remote: Remote) -> tuple[str, Image]:
    where = str(remote.reference)
    name = remote.reference.digest or remote.reference.tag or "latest"
    data, media_type = _checked(remote, name)
    digest = f"sha256:{files.digest(data)}"
    if media_type in INDEXES:
        chosen = image.choose(image.parse_json(data, where=where), where=where)
        data, media_type = _checked(remote, chosen.digest)
    return digest, image.parse_manifest(data, where=where)


def _checked(remote: Remote, name: str) -> tuple[bytes, str]:
    found = manifest(remote, name)
    if found is None:
        raise remote.refusal("REG-123", f"has no image {name}", "check the name and the tag")
    if name.startswith("sha256:") and f"sha256:{files.digest(found[0])}" != name:
        raise remote.refusal("REG-143", f"sent a manifest that is not {name}", "push it again")
    return found


def _download(remote: Remote, blob: Blob, layout: Path, report: Callable[[int], None]) -> None:
    path = image.blob_path(layout, blob)
    answer = remote.request("GET", f"/blobs/{blob.digest}", expect=(200,), stream=True)
    seen, count = hashlib.sha256(), 0
    try:
        with answer, path.open("wb") as out:
            for piece in answer.iter_content(CHUNK):
                count += len(piece)
                if count > blob.size:
                    break
                seen.update(piece)
                out.write(piece)
                report(count)
    except requests.exceptions.RequestException as error:
        what = f"broke off the blob {blob.digest} ({type(error).__name__})"
        raise Again(Problem("REG-135", str(remote.reference), what, "try again")) from None
    if count < blob.size:
        what = f"sent {count:,} of {blob.size:,} bytes of {blob.digest}"
        raise Again(Problem("REG-135", str(remote.reference), what, "try again"))
    if f"sha256:{seen.hexdigest()}" != blob.digest:
        what = f"sent bytes that are not {blob.digest}"
        raise remote.refusal("REG-143", what, "look after the registry's storage, push again")
