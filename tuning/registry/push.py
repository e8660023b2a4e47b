"""Exactly one right digest under the tag, whatever happened before or happens in between.

Look at the tag, decide; HEAD each blob and upload what is missing; PUT the manifest by digest, then
the tag; read everything back. A crash between any two steps is repaired by doing it again from the
first, because each step is idempotent and blobs are named by their content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tuning import image
from tuning.errors import Problem, RefusedError
from tuning.image import Blob, Image
from tuning.reference import Reference
from tuning.registry.wire import Again, Remote

ACCEPT = ", ".join((image.MANIFEST, image.DOCKER_MANIFEST, image.INDEX, image.DOCKER_INDEX))
INDEXES = frozenset({image.INDEX, image.DOCKER_INDEX})
CHUNK = 1 << 20
Progress = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class Found:
    """What a tag points at."""

    digest: str
    run_id: str | None  # of the run that made it, if it is one of ours


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    digest: str
    bytes_sent: int  # of blobs
    reused: int  # blobs that were there already


def manifest(remote: Remote, name: str) -> tuple[bytes, str] | None:
    """The manifest `name` (tag or digest) and its media type; None where there is none."""
    answer = remote.request(
        "GET", f"/manifests/{name}", expect=(200, 404), headers={"Accept": ACCEPT}
    )
    if answer.status_code == 404:
        return None
    if len(answer.content) > image.LARGEST_JSON:
        raise image.refused(str(remote.reference), "has a manifest of impossible size")
    media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
    return answer.content, media_type


def look(remote: Remote) -> Found | None:
    """What the tag of the remote's reference points at now."""

    def work() -> Found | None:
        found = manifest(remote, _tag(remote.reference))
        if found is None:
            return None
        data, media_type = found
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if media_type in INDEXES:
            inner = image.choose(image.parse_json(data, where=digest), where=digest)
            found = manifest(remote, inner.digest)
            data = found[0] if found else b"{}"
        try:
            run_id = image.parse_manifest(data, where=digest).run_id
        except RefusedError:  # an artifact of another kind: somebody else's
            run_id = None
        return Found(digest, run_id)

    return remote.persist(work)


def claim(
    remote: Remote,
    *,
    run_id: str | None,
    own: Collection[str],
    on_tag_exists: Literal["refuse", "overwrite"],
) -> Found | None:
    """Whether the tag may be written: what this very run left there, or None for a free way.

    `own` holds digests that this run directory or Workspace put out before: they are replaced.
    `run_id` None means not known yet; then an image of any run passes for now. Raises RefusedError
    for an image of somebody else, unless it is to be overwritten.
    """
    found = look(remote)
    if found is None or found.digest in own:
        return None
    if found.run_id is not None and run_id in (None, found.run_id):
        return found if run_id else None
    if on_tag_exists == "overwrite":
        return None
    raise _taken(remote, found, None)


def _taken(remote: Remote, found: Found, ours: str | None) -> RefusedError:
    instead = f", this one is {ours}" if ours else ""
    return remote.refusal(
        "REG-140",
        f"the tag already holds {found.digest}, which this run did not make{instead}",
        "choose another tag, or set the annotation tuning.kaito.sh/on-tag-exists: overwrite",
    )


def check_push(remote: Remote) -> None:
    """Whether the login may push: an upload is begun and given up. Raises RefusedError."""

    def work() -> None:
        answer = remote.request("POST", "/blobs/uploads/", expect=(202,))
        location = answer.headers.get("Location")
        if location:
            remote.request("DELETE", remote.absolute(location), expect=range(200, 500))

    remote.persist(work)


def push(
    remote: Remote,
    layout: Path,
    *,
    run_id: str,
    own: Collection[str] = (),
    on_tag_exists: Literal["refuse", "overwrite"] = "refuse",
    progress: Progress = lambda done, total, note: None,
) -> Pushed:
    """Put the image of `layout` under the tag of the remote's reference, verified.

    Done again after any crash it ends the same way, and sends nothing that is there already. Raises
    RefusedError for a final no, TransientError when the registry stays away.
    """
    ours = image.read(layout)
    claim(remote, run_id=run_id, own={*own, ours.digest}, on_tag_exists=on_tag_exists)
    blobs = (ours.config, *ours.layers)
    total, sent, reused = sum(blob.size for blob in blobs), 0, 0
    done = 0
    for blob in blobs:

        def report(count: int, before: int = done) -> None:
            progress(before + count, total, "")

        uploaded = remote.persist(partial(_blob, remote, layout, blob, report))
        done += blob.size
        sent, reused = sent + uploaded, reused + (uploaded == 0)
        progress(done, total, "")
    data = image.blob_path(layout, Blob(image.MANIFEST, ours.digest, 0)).read_bytes()
    remote.persist(lambda: _put_manifest(remote, ours.digest, data))
    tag = _tag(remote.reference)
    found = look(remote)
    if found is None or found.digest != ours.digest:
        remote.persist(lambda: _put_manifest(remote, tag, data))
    remote.persist(lambda: verify(remote, ours))
    return Pushed(ours.digest, sent, reused)


def _blob(remote: Remote, layout: Path, blob: Blob, report: Callable[[int], None]) -> int:
    """Upload one blob unless it is there; gives the bytes sent. Safe to repeat from the start."""
    if _has(remote, blob):
        return 0
    answer = remote.request("POST", "/blobs/uploads/", expect=(202, 201))
    location = answer.headers.get("Location", "")
    url = remote.absolute(location)
    url += f"{'&' if '?' in url else '?'}digest={blob.digest}"
    path = image.blob_path(layout, blob)
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
    answer = remote.request(
        "PUT",
        url,
        expect=(201, 204, 307, 308, 400, 404, 416),
        body=lambda: _Body(path, blob.size, report),
        headers=headers,
    )
    if answer.status_code in (307, 308):  # to a store that signed the way in its URL
        remote.request(
            "PUT",
            remote.absolute(answer.headers.get("Location", "")),
            expect=(200, 201, 204),
            body=lambda: _Body(path, blob.size, report),
            headers=headers,
        )
    if not _has(remote, blob):
        status = answer.status_code
        what = f"lost the upload of {blob.digest} (it answered {status})"
        problem = Problem("REG-133", str(remote.reference), what, "try again later")
        raise Again(problem, status=500 if status == 400 else status)
    return blob.size


class _Body:
    """A file as a request's body: read as it is sent, with a length, and a report of how far."""

    def __init__(self, path: Path, size: int, report: Callable[[int], None]) -> None:
        self._path, self._size, self._report = path, size, report

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        with self._path.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece
                sent += len(piece)
                self._report(sent)


def _has(remote: Remote, blob: Blob) -> bool:
    answer = remote.request("HEAD", f"/blobs/{blob.digest}", expect=(200, 404))
    return answer.status_code == 200


def _put_manifest(remote: Remote, name: str, data: bytes) -> None:
    answer = remote.request(
        "PUT",
        f"/manifests/{name}",
        expect=(200, 201, 202, 400, 409),
        body=lambda: data,
        headers={"Content-Type": image.MANIFEST},
    )
    if answer.status_code in (400, 409):  # an immutable tag answers so even for the same bytes
        found = manifest(remote, name)
        if found is None or found[0] != data:
            status = answer.status_code
            what = f"answered {status} to the manifest {name}"
            change = "choose another tag: this one may be immutable"
            raise remote.refusal("REG-141", what, change)


def verify(remote: Remote, ours: Image) -> None:
    """Read the tag back and look for every blob. Raises RefusedError if anything differs."""
    found = manifest(remote, _tag(remote.reference))
    held = f"sha256:{hashlib.sha256(found[0]).hexdigest()}" if found else None
    if held is None:
        problem = Problem("REG-134", str(remote.reference), "does not show the tag", "try again")
        raise Again(problem)
    if held != ours.digest:
        raise _taken(remote, Found(held, None), ours.digest)
    for blob in (ours.config, *ours.layers):
        if not _has(remote, blob):
            what = f"lost the blob {blob.digest} after it took it"
            raise remote.refusal("REG-142", what, "look after the registry's storage, push again")


def _tag(reference: Reference) -> str:
    return reference.digest or reference.tag or "latest"
